"""Parse chunks of a file into rows: a row's fields and where it stands, or why it is rejected.

Reading is split in two, so that parsing can run in parallel: the readers run through a file in one process and do as
little as they can; :func:`parse_rows` parses what they yield, in whichever process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.errors import DataError

BOM = b"\xef\xbb\xbf"  # byte-order mark of UTF-8
CHUNK_LINES = 1000
MAX_RAW_LENGTH = 2000


@dataclass(frozen=True, slots=True)
class Row:
    """One raw row of a source.

    Attributes:
        fields: as they stand in the file.
        where: its place for messages, ``name:line``.
        line: of the file, from 1 (of a CSV record the first one), or the row's number where a file has no lines.
        file: which file of its source it is in.
    """

    fields: dict[str, Any]
    where: str
    line: int
    file: int = 0


class RowError(DataError):
    """One row cannot be used. ``code`` is a short fixed word for tables and tests: ``broken_json``."""

    def __init__(self, code: str, where: str, **message: Any) -> None:
        self.code = code
        super().__init__(where, **message)


@dataclass(frozen=True, slots=True)
class RejectedRow:
    """A row that cannot be used: a line of ``refused.jsonl``.

    Attributes:
        where: ``name:line``.
        reason: a short fixed word, :attr:`RowError.code`.
        message: the reason in words and a hint, as one line; neither ``where`` nor the text.
        raw: its text, at most ``MAX_RAW_LENGTH`` characters; bytes that are not UTF-8 as ``\\xff``.
        hint: the hint alone, which ends ``message`` too.
    """

    where: str
    reason: str
    message: str
    raw: str
    hint: str = ""


ParsedRow = tuple[int, dict[str, Any] | RejectedRow]  # its line or number, from 1, and its fields


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive rows of one file: undecoded lines of JSONL, or rows that a reader has parsed already; picklable.

    Attributes:
        file: which of ``Source.names``.
        name: that name.
        line: of the first row, from 1.
        lines: raw lines, when the file is JSONL.
        rows: when it is not; a row that its reader rejected stands among them.
    """

    file: int
    name: str
    line: int
    lines: tuple[bytes, ...] = ()
    rows: tuple[ParsedRow, ...] = ()


def parse_rows(chunk: Chunk) -> Iterator[Row | RejectedRow]:
    """Parse a chunk: one JSON object a line; blank lines are skipped, a byte-order mark at the file's start is dropped.
    What cannot be parsed comes as :class:`RejectedRow`, in its place; nothing is raised."""
    for line, raw in enumerate(chunk.lines, start=chunk.line):
        if not raw.isspace() and raw:
            yield from _parse_line(raw, line, chunk)
    for line, fields in chunk.rows:
        yield fields if isinstance(fields, RejectedRow) else Row(fields, f"{chunk.name}:{line}", line, chunk.file)


def _parse_line(raw: bytes, line: int, chunk: Chunk) -> Iterator[Row | RejectedRow]:
    where = f"{chunk.name}:{line}"
    try:
        text = raw.decode("utf-8-sig" if line == 1 else "utf-8").strip()
        if text:
            fields = json.loads(text)
            is_object = isinstance(fields, dict)
            yield Row(fields, where, line, chunk.file) if is_object else reject_non_object(where, fields, raw)
    except UnicodeDecodeError as error:
        yield reject_non_utf8(where, raw, f"byte {error.start}")
    except (ValueError, RecursionError) as error:
        reason, hint = f"is not JSON ({describe_json_error(error)})", "write one JSON object a line (JSONL)"
        yield reject(where, "broken_json", reason, hint, raw)


def describe_json_error(error: Exception) -> str:
    """Say what ``json`` raised, in words: besides its own error it lets Python's limits through."""
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"


def reject_non_object(where: str, value: Any, raw: bytes | str) -> RejectedRow:
    """Reject a row that is valid JSON, and no object."""
    reason = f"is a JSON {type(value).__name__}, not an object"
    return reject(where, "not_an_object", reason, "write {…} for each row", raw)


def reject_non_utf8(where: str, raw: bytes | str, place: str) -> RejectedRow:
    """Reject a row that holds bytes which are no UTF-8."""
    return reject(where, "not_utf8", f"is not UTF-8 ({place})", "save the file as UTF-8", raw)


def reject(where: str, code: str, reason: str, hint: str, raw: bytes | str | Mapping[str, Any]) -> RejectedRow:
    """Reject a row, with its message and its text in the form that they have everywhere."""
    return RejectedRow(where, code, f"{reason} → {hint}", raw_text(raw), hint)


def raw_text(raw: bytes | str | Mapping[str, Any]) -> str:
    """Return a row's text for people: at most ``MAX_RAW_LENGTH`` characters that can be written as UTF-8, without its
    line end. The fields of a row that never was text are written as JSON."""
    if isinstance(raw, Mapping):
        raw = json.dumps(raw, ensure_ascii=False, default=str)
    if isinstance(raw, str):
        # bytes that were decoded with surrogateescape become themselves again; a real lone surrogate stays visible
        text = "".join(_escape_surrogate(c) if "\ud800" <= c <= "\udfff" else c for c in raw[:MAX_RAW_LENGTH])
    else:
        text = raw[: 4 * MAX_RAW_LENGTH].decode("utf-8", "backslashreplace")
    return text.rstrip("\r\n")[:MAX_RAW_LENGTH]


def _escape_surrogate(surrogate: str) -> str:
    code = ord(surrogate)
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"
