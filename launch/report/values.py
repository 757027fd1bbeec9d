"""Compare the configs of runs: which keys differ, and what a value looks like."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

MISSING = "–"


def differing_keys(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys whose values are not the same in all configs that have keys, in the order of the first one."""
    known = [config for config in configs if config]
    keys = dict.fromkeys(key for config in known for key in config)
    return [key for key in keys if len({show(config.get(key)) for config in known}) > 1]


def show(value: Any) -> str:
    """Return a value as it is typed in an override."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str).replace('"', "")


def parse_value(text: str | None) -> Any:
    """Return the number that a cell of a table holds, or its text."""
    if text is None or text == "":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def ordered(values: Sequence[Any]) -> list[Any]:
    """Return the different values, numbers by size, then others as they come."""
    seen = {show(value): value for value in values}
    numbers = [v for v in seen.values() if isinstance(v, int | float) and not isinstance(v, bool)]
    return [*sorted(numbers), *(v for v in seen.values() if not any(v is n for n in numbers))]


def independent(axes: Sequence[str], points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the axes that tell something new: alpha that is always twice the rank does not.

    Args:
        axes: keys with values in each point.
        points: by key.
    """
    kept: list[str] = []
    for key in axes:
        values = [show(point.get(key)) for point in points]
        if len(set(values)) < 2:
            continue
        others = [[show(point.get(other)) for point in points] for other in kept]
        if not any(len(set(zip(values, other))) == len(set(other)) == len(set(values)) for other in others):
            kept.append(key)
    return kept
