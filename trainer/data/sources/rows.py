"""One row of training data: its fields and where it stands, or why it cannot be used.

Reading is split in two, so that it can go on in parallel: the readers run through a file in one process and do as
little as they can; :func:`parse_rows` parses what they hand on, wherever it is wanted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.errors import DataError

CHUNK_LINES = 1000
MAX_RAW_LENGTH = 2000


@dataclass(frozen=True, slots=True)
class Row:
    """One raw row: its fields, where it stands (``name:line``, from 1), and which file of its source it is in.

    ``line`` is a line of the file (of a CSV record the first one), or the row's number where a file has no lines.
    """

    fields: dict[str, Any]
    where: str
    line: int
    file: int = 0


class RowError(DataError):
    """One row cannot be used. ``code`` is a short fixed word for tables and tests (``broken_json``)."""

    def __init__(self, code: str, where: str, **message: Any) -> None:
        self.code = code
        super().__init__(where, **message)


@dataclass(frozen=True, slots=True)
class RejectedRow:
    """A row that cannot be used, for ``refused.jsonl``.

    Attributes:
        where: ``name:line``.
        reason: a short fixed word.
        message: the rule that it breaks and the cure, as one line; neither ``where`` nor the text.
        raw: its text, at most ``MAX_RAW_LENGTH`` characters; bytes that are not UTF-8 as ``\\xff``.
    """

    where: str
    reason: str
    message: str
    raw: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive rows of one file, picklable: undecoded lines of JSONL, or rows that a reader already parsed.

    Attributes:
        file: which of ``Source.names``.
        name: that name.
        line: of the first row, from 1.
        lines: raw lines, when the file is JSONL.
        rows: ``(line, fields)``, when it is not; a row that its reader had to refuse stands among them.
    """

    file: int
    name: str
    line: int
    lines: tuple[bytes, ...] = ()
    rows: tuple[tuple[int, dict[str, Any] | RejectedRow], ...] = ()


def parse_rows(chunk: Chunk) -> Iterator[Row | RejectedRow]:
    """Parse a chunk: one JSON object a line; blank lines are passed over, a byte-order mark at the file's start is
    dropped. What cannot be parsed comes as :class:`Refused`, in its place; nothing is raised."""
    for line, raw in enumerate(chunk.lines, start=chunk.line):
        if not raw.isspace() and raw:
            yield from _parsed(raw, line, chunk)
    for line, fields in chunk.rows:
        yield fields if isinstance(fields, RejectedRow) else Row(fields, f"{chunk.name}:{line}", line, chunk.file)


def _parsed(raw: bytes, line: int, chunk: Chunk) -> Iterator[Row | RejectedRow]:
    where = f"{chunk.name}:{line}"
    try:
        text = raw.decode("utf-8-sig" if line == 1 else "utf-8").strip()
        if text:
            fields = json.loads(text)
            yield (
                Row(fields, where, line, chunk.file) if isinstance(fields, dict) else not_an_object(where, fields, raw)
            )
    except UnicodeDecodeError as error:
        yield not_utf8(where, raw, f"byte {error.start}")
    except (ValueError, RecursionError) as error:
        reason, hint = f"is not JSON ({json_trouble(error)})", "write one JSON object a line (JSONL)"
        yield refused(where, "broken_json", reason, hint, raw)


def json_trouble(error: Exception) -> str:
    """What ``json`` did not like, in words: besides its own error it lets Python's limits through."""
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"


def not_an_object(where: str, value: Any, raw: bytes | str) -> RejectedRow:
    """The refusal of a row that is valid JSON, and no object."""
    reason = f"is a JSON {type(value).__name__}, not an object"
    return refused(where, "not_an_object", reason, "write {…} for each row", raw)


def not_utf8(where: str, raw: bytes | str, place: str) -> RejectedRow:
    """The refusal of a row that holds bytes which are no UTF-8."""
    return refused(where, "not_utf8", f"is not UTF-8 ({place})", "save the file as UTF-8", raw)


def refused(where: str, code: str, reason: str, hint: str, raw: bytes | str | Mapping[str, Any]) -> RejectedRow:
    """A :class:`Refused` with its message and text in the form that they have everywhere."""
    return RejectedRow(where, code, f"{reason} → {hint}", raw_text(raw))


def raw_text(raw: bytes | str | Mapping[str, Any]) -> str:
    """A row as it is kept for reading: at most ``MAX_RAW_LENGTH`` characters that can be written as UTF-8, without its
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
