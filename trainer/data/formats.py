"""Rows into conversations: the shapes in which people keep their data, told apart by their fields."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.data.sources import Row
from trainer.errors import DataError


@dataclass(frozen=True, slots=True)
class Example:
    """One instruction, its optional input, and the answer that is learnt."""

    instruction: str
    input: str
    output: str
    where: str
    line: int


def recognise(row: Row, format_name: str) -> str:
    """The format of a row's fields.

    Args:
        row: the first row of the data.
        format_name: ``data.format``; anything but ``auto`` is returned as it is.

    Raises:
        DataError: ``auto``, and the fields fit no known format.
    """
    if format_name != "auto":
        return format_name
    if "instruction" in row.fields and "output" in row.fields:
        return "alpaca"
    raise DataError(
        row.where,
        value=f"fields {', '.join(sorted(row.fields)) or 'none'}",
        rule="fit no known format",
        cure="give each row `instruction`, `output` and, if wanted, `input` (Alpaca)",
    )


def alpaca(row: Row) -> Example:
    """An Alpaca row (Taori et al., 2023): ``instruction``, optional ``input``, ``output``, all strings.

    Raises:
        DataError: a field is missing, is not a string, or holds no text where text is needed.
    """
    instruction, answer = (_text(row, name) for name in ("instruction", "output"))
    given = "" if row.fields.get("input") is None else _text(row, "input", may_be_empty=True)
    return Example(instruction, given, answer, row.where, row.line)


def _text(row: Row, name: str, may_be_empty: bool = False) -> str:
    if name not in row.fields:
        raise DataError(f"{row.where} {name}", rule="is missing", cure=f"give the row a string `{name}`")
    value = row.fields[name]
    if not isinstance(value, str):
        raise DataError(
            f"{row.where} {name}",
            value=repr(value)[:60],
            rule=f"is {type(value).__name__}, not a string",
            cure="quote it",
        )
    if not value.strip() and not may_be_empty:
        raise DataError(f"{row.where} {name}", rule="is empty: there is nothing to learn from", cure="remove the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{row.where} {name}", rule=f"holds half a surrogate pair at {error.start}", cure="repair the \\u escape"
        ) from error
    return value
