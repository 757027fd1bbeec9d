"""A row read in its format, and what is said when it cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.data.formats.detect import detect_format
from trainer.data.formats.parse import parse_example
from trainer.data.formats.turns import Example
from trainer.data.sources.rows import Row, RowError

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def row(fields: dict[str, Any]) -> Row:
    return Row(fields, "rows.jsonl:7", 7, 2)


def read(fields: dict[str, Any], format: str = "auto", columns: dict[str, str] | None = None) -> Example:
    return parse_example(row(fields), detect_format(row(fields), format, columns or {}), columns or {})


def refused(fields: dict[str, Any], format: str = "auto", columns: dict[str, str] | None = None) -> RowError:
    with pytest.raises(RowError) as caught:
        read(fields, format, columns)
    assert str(caught.value).startswith("rows.jsonl:7")
    assert "\n" not in str(caught.value)
    return caught.value


def said(example: Example) -> list[tuple[str, str, bool]]:
    return [(turn.role, turn.text, turn.answer) for turn in example.turns]
