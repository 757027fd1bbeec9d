"""Tell which rows belong together in the split: those that begin alike, or have one value in a column."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from trainer.config.messages import nearest
from trainer.data.formats.turns import Example
from trainer.data.sources.rows import Row, RowError
from trainer.data.templates.plain_templates import user_text
from trainer.errors import DataError

BY_ROW = "row"


def hash_bytes(data: bytes) -> int:
    """Return 64 bits of a hash, as a signed number."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def group_hash(example: Example, row: Row, group_by: str | None) -> int:
    """Return what is equal for rows that must fall on one side of the split.

    Args:
        example: the row's; its text up to the end of the first user turn counts, where ``group_by`` says nothing else:
            a conversation that was exploded by turn stays together, however a template writes its earlier turns.
        row: the row.
        group_by: ``data.group_by``: a column, or ``row``.

    Raises:
        RowError: the row has no such column, or null in it.
    """
    if group_by is None:
        return hash_bytes(_opening(example).encode("utf-8", "surrogatepass"))
    if group_by == BY_ROW:
        return hash_bytes(f"{row.file}:{row.line}".encode())
    value: Any = row.fields.get(group_by)
    if value is None:
        code, reason = ("null", "is null") if group_by in row.fields else ("missing_field", "is missing")
        reason += ", and data.group_by groups the rows by it"
        raise RowError(code, f"{row.where} {group_by}", reason=reason, hint="give it a value, or another data.group_by")
    return hash_bytes(json.dumps(value, sort_keys=True, default=str).encode())


def check_group_by(row: Row, group_by: str | None) -> None:
    """Raise a :class:`DataError` where the first row of a data set has no column ``group_by``."""
    if group_by is None or group_by == BY_ROW or group_by in row.fields:
        return
    columns = sorted(row.fields)
    hint = f"data.group_by={nearest(group_by, columns) or next(iter(columns), BY_ROW)}"
    raise DataError(
        "data.group_by", value=group_by, reason=f"is no column of {row.where}: {', '.join(columns)}", hint=hint
    )


def _opening(example: Example) -> str:
    """Return what is said up to the end of the first user turn(s), trimmed as templates do; else all that is said."""
    if example.text is not None:
        return example.text
    said: list[str] = []
    for turn in example.turns:
        if turn.role == "user":
            said.append(f"user {user_text(turn).strip()}")
        elif any(text.startswith("user") for text in said):
            return "\0".join(said)
        elif turn.role == "system":
            said.append(f"system {turn.text.strip()}")
    return "\0".join(said if any(text.startswith("user") for text in said) else (t.text for t in example.turns))
