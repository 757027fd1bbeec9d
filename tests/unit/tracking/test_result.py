"""How a run has ended, on one screen: the files' own numbers, and commands as they are typed."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from trainer.config import load
from trainer.config.method import METHODS, NOT_MERGEABLE
from trainer.tracking.result import duration, result_lines, size_of, size_text

SUMMARY = {
    "status": "finished",
    "steps": 150,
    "wall_seconds": 515.4,
    "metrics": {"eval_loss": 0.2249, "eval_loss_before": 3.2488, "exact_match": 0.7734},
}
RECORDS = [{"step": 0, "eval_loss": 3.2488}] + [
    {"step": n, "useful_tokens_per_second": speed, "peak_memory_bytes": n * 2**30}
    for n, speed in enumerate((100.0, 900.0, 220.0), start=1)
]


def lines_of(folder: Path, *overrides: str, **arguments: Any) -> list[str]:
    config = load(["model=tiny", "data.path=hub/rows", *overrides], with_data=False)
    return result_lines(folder, config, SUMMARY, RECORDS, **arguments)


def leave(folder: Path, trained: str = "adapter") -> None:
    (folder / trained).mkdir(parents=True)
    (folder / trained / "weights.safetensors").write_bytes(bytes(3 * 2**19))
    (folder / "wandb" / "offline-run-20261128_010203-abc").mkdir(parents=True)


def test_the_end_of_a_run(tmp_path: Path) -> None:
    run = tmp_path / "my runs" / "demo"
    leave(run)
    quoted = shlex.quote(str(run))
    assert lines_of(run) == [
        "eval_loss: 3.2488 → 0.2249",
        "exact_match: 0.7734",
        f"finished 150 steps in 8 min 35 s: {run}",
        "speed: 220 useful tokens/s (median step), at most 3.0 GiB of a device",
        f"adapter: {run / 'adapter'} (1.5 MiB)",
        f"next: afina chat {quoted}",
        f"      afina merge {quoted} --to {shlex.quote(f'{run}-merged')}",
        f"      afina report {quoted}",
        f"      wandb sync {quoted}/wandb/offline-run-*",
    ]
    assert not any("afina" in line for line in lines_of(run, with_next=False))


@pytest.mark.parametrize("method", METHODS)
def test_only_what_can_be_merged_is_offered_to_be(method: str, tmp_path: Path) -> None:
    trained = "model" if method == "full" else "adapter"
    leave(tmp_path / "run", trained)
    lines = lines_of(tmp_path / "run", f"method={method}")
    assert any(line.startswith(f"{trained}: ") for line in lines)
    assert any("afina merge" in line for line in lines) == (method not in NOT_MERGEABLE)


def test_a_folder_without_its_adapter_offers_none(tmp_path: Path) -> None:
    assert not [line for line in lines_of(tmp_path) if "adapter" in line or "merge" in line or "chat" in line]


def test_times_and_sizes_are_short(tmp_path: Path) -> None:
    assert [duration(s) for s in (42, 515.4, 11_520)] == ["42 s", "8 min 35 s", "3 h 12 min"]
    assert [size_text(b) for b in (812, 1536, 9_800_000, 5e9)] == ["812 B", "1.5 KiB", "9.3 MiB", "4.7 GiB"]
    with (tmp_path / "file").open("wb") as file:
        file.truncate(3 * 2**30)
    assert size_of(tmp_path) == "3.0 GiB"
