"""Data travels one way: each sub-room of trainer/data imports only what stands before it."""

from __future__ import annotations

from tests.helpers.layout import imported, module_name, sources

# Importer -> the sub-rooms and modules of trainer/data that it may import.
MAY_IMPORT = {
    "sources": set(),
    "formats": {"sources"},
    "templates": {"sources", "formats"},
    "prepare": {"sources", "formats", "templates"},
    "batching": set(),
    "mixture": {"prepare"},
    "validation_split": set(),
    "run_data": {"prepare", "mixture", "batching"},
    "splits_in_use": {"sources", "prepare"},
    "load": {"prepare", "templates", "mixture", "splits_in_use", "validation_split", "run_data"},
    "step_batches": {"batching", "run_data"},
    "describe": {"run_data"},
}


def test_data_travels_one_way() -> None:
    wrong, seen = [], set()
    for path in sources("trainer/data"):
        parts = module_name(path).split(".")
        if len(parts) < 3:
            continue
        seen.add(parts[2])
        for line, name in imported(path):
            target = name.split(".")
            if target[:2] == ["trainer", "data"] and target[2] not in {parts[2], *MAY_IMPORT[parts[2]]}:
                wrong.append(f"{path.name}:{line} imports {name}")
    assert wrong == []
    assert seen == set(MAY_IMPORT)
