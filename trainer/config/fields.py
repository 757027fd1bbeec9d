"""A configuration field that carries its own documentation and its own limits."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def key(default: Any, help: str, **limits: Any) -> Any:
    """A documented config field.

    Args:
        default: the value when no YAML and no override sets it; a list or dict is copied for each config.
        help: one sentence: meaning, unit, effect or cost.
        **limits: any of ``choices`` (tuple of allowed values), ``ge``, ``gt``, ``le``, ``lt`` (numeric bounds).
    """
    unknown = set(limits) - {"choices", "ge", "gt", "le", "lt"}
    assert not unknown, f"unknown limits {unknown}"
    metadata = {"help": help, **limits}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)
