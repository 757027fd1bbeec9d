"""Which configurations are the same run, derived from the marks ``changes_result`` and ``resume_may_change`` of fields.

Three questions have one answer: a run's default name, whether a finished run is the one that was asked for, and whether
a checkpoint belongs to a run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config.method import METHODS
from trainer.config.schema import TrainConfig
from trainer.config.suggestions import conf_dir, config_fields, default_value

# Fields that hold paths: in the checkout they are taken relative to it, so that a run has the same name in each.
PATH_FIELDS = frozenset({"data.path", "data.validation", "data.template", "method.adapter"})


def result_fields(config: TrainConfig) -> dict[str, Any]:
    """Return ``{dotted key: value}`` of every field that changes the result, in the schema's order."""
    return {
        name: _portable(value) if name in PATH_FIELDS else value
        for name, value in values_of(config).items()
        if config_fields()[name].changes_result
    }


def changed_result_fields(before: TrainConfig, now: TrainConfig) -> list[tuple[str, Any, Any]]:
    """Compare two configurations by what changes the result; none changed: they are the same run.

    Returns:
        ``(dotted key, value before, value now)`` of each key that differs. A key below a mapping (``zero.extra.…``)
        stands for itself; ``None`` is the value where it is not there.
    """
    return _differences(result_fields(before), result_fields(now))


def changed_fields(before: TrainConfig, now: TrainConfig) -> list[tuple[str, Any, Any]]:
    """Compare two configurations in full, as :func:`changed_result_fields` does."""
    return _differences(values_of(before), values_of(now))


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    was, is_now = _flatten(before), _flatten(now)
    return [(key, was.get(key), is_now.get(key)) for key in {**is_now, **was} if was.get(key) != is_now.get(key)]


def run_identity(config: TrainConfig, data_fingerprint: str) -> dict[str, Any]:
    """Return what a run must have in common with a checkpoint that it is resumed from; everything else may change.

    It is written into every checkpoint, so its keys cannot change, and new ones must be marked as ``newer``: a run is
    refused when another of them is not there.

    Args:
        config: of the run.
        data_fingerprint: of the prepared data; it stands for the whole ``data`` section.

    Returns:
        ``{dotted key: value}`` of the fields that change the result and that a resumed run may not change, of
        ``method`` those that mean something for the method; and ``data``.
    """
    meaningful = METHODS[config.method.name].keys | {"name"}
    identity: dict[str, Any] = {}
    for name, value in values_of(config).items():
        entry, (section, field) = config_fields()[name], name.split(".")
        bound = entry.changes_result and not entry.resume_may_change
        if bound and section != "data" and (section != "method" or field in meaningful):
            identity[name] = value
    # Last: another seed or model prepares other data, and the first key that differs is the one that is named.
    return {**identity, "data": data_fingerprint}


def saved_value(identity: Mapping[str, Any], key: str) -> Any:
    """Return the value of a key in a checkpoint's identity: its default in one from before there was the key."""
    entry = config_fields().get(key)
    is_newer = entry is not None and entry.field.metadata["newer"]
    return default_value(entry.field) if entry is not None and is_newer and key not in identity else identity.get(key)


def values_of(config: TrainConfig) -> dict[str, Any]:
    """Return ``{dotted key: value}`` of every field, in the schema's order."""
    tree = dataclasses.asdict(config)
    return {name: tree[section][field] for name in config_fields() for section, field in [name.split(".")]}


def _flatten(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{above}{name}.") if isinstance(value, dict) else {f"{above}{name}": value}
    return flat


def _portable(path: Any) -> Any:
    """Return a path, a list of them, or a list of ``{path: …}``; with those in the checkout relative to it."""
    root = conf_dir().parent
    if isinstance(path, list):
        return [_portable(item) for item in path]
    if isinstance(path, dict):
        return {key: _portable(value) if key == "path" else value for key, value in path.items()}
    if isinstance(path, str) and Path(path).is_relative_to(root):
        return str(Path(path).relative_to(root))
    return path
