"""Undo the other ways in which lists of messages and tools are written: as JSON in a string, as lists by key."""

from __future__ import annotations

import json
from typing import Any

from trainer.data.sources.rows import RowError


def as_list(where: str, value: Any, what: str) -> Any:
    """Return a list of objects that may be written otherwise; whatever is none comes back as it is.

    Args:
        where: its place.
        value: the list; or that as a string of JSON, its items as such strings, or an object of lists, one a key.
        what: the items, for messages: ``messages``.

    Raises:
        RowError: a string is no JSON, or the lists by key differ in length.
    """
    if isinstance(value, str) and value.strip():
        value = _parse_json(where, value, what)
    if isinstance(value, dict) and value and all(isinstance(items, list) for items in value.values()):
        return _rows_of(where, value)
    if isinstance(value, list) and any(isinstance(item, str) and item.lstrip()[:1] == "{" for item in value):
        parsed = (_parse_json(f"{where}[{i}]", v, what) if isinstance(v, str) else v for i, v in enumerate(value))
        return list(parsed)
    return value


def _parse_json(where: str, text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = f"is not JSON ({' '.join(str(error).split())[:100]})"
        hint = f"give a list of {what}, or that list as one string of JSON"
        raise RowError("wrong_type", where, reason=reason, hint=hint) from error


def _rows_of(where: str, lists: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Turn ``{"role": [...], "content": [...]}``, which ``datasets`` makes of lists of objects, back into objects."""
    lengths = {key: len(items) for key, items in lists.items()}
    if len(set(lengths.values())) > 1:
        reason = f"has lists of different lengths ({', '.join(f'{key}: {n}' for key, n in lengths.items())})"
        raise RowError("wrong_type", where, reason=reason, hint="give as many of each")
    found = [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
    return [{key: value for key, value in item.items() if value is not None} for item in found]
