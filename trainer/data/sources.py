"""Rows out of files. A row keeps the place it came from, so every later error can name it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from trainer.errors import DataError


@dataclass(frozen=True, slots=True)
class Row:
    """One raw row: its fields, and where it stands (``where`` is ``file:line``, lines from 1)."""

    fields: dict[str, Any]
    where: str
    line: int


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSONL file, one JSON object a line; blank lines are passed over, a byte-order mark is dropped.

    Raises:
        DataError: the file cannot be opened, a line is not UTF-8, not JSON, or not an object.
    """
    with open_bytes(path) as stream:
        for line, raw in enumerate(stream, start=1):
            where = f"{path.name}:{line}"
            try:
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise DataError(
                    where, rule=f"is not UTF-8 (byte {error.start})", cure="save the file as UTF-8"
                ) from error
            if text:
                yield Row(_parse(text, where), where, line)


def open_bytes(path: Path) -> BinaryIO:
    """The file, open for reading.

    Raises:
        DataError: it cannot be opened.
    """
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(
            "data.path", value=path, rule=f"cannot be read ({error.strerror})", cure="name a JSONL file"
        ) from error


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        # besides its own error, json lets Python's limit on the digits of a whole number through
        other = "nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"
        reason = error.msg if isinstance(error, json.JSONDecodeError) else other
        raise DataError(
            where, value=_short(text), rule=f"is not JSON ({reason})", cure="write one JSON object a line (JSONL)"
        ) from error
    if not isinstance(fields, dict):
        raise DataError(
            where, value=_short(text), rule=f"is a JSON {type(fields).__name__}, not an object", cure="write {…} a line"
        )
    return fields


def _short(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "…")
