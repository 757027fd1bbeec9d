"""Read files named ``.json``: an array of objects, an object around such an array, one row, or in truth JSONL."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, BinaryIO

from trainer.config.dataset_spec import FIELDS
from trainer.data.sources.rows import (
    BOM,
    ParsedRow,
    RejectedRow,
    describe_json_error,
    reject_non_object,
    reject_non_utf8,
)
from trainer.errors import DataError

_ARRAY_OF_OBJECTS = re.compile(rb"\[\s*\{")
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


def json_rows(stream: BinaryIO, name: str) -> tuple[Iterable[bytes], Iterable[ParsedRow]]:
    """Read the rows of a ``.json`` file: as lines when its text is JSONL, which streams; else parsed, the whole file.

    A parsed row's ``line`` is the line of the file on which it begins; where rows share a line, the row's number.

    Raises:
        DataError: the file's one value is broken, which leaves no row to be trusted after that place; or it holds
            several arrays of objects.
    """
    lines = list(_lines_until_text(stream))
    first = b"".join(lines).removeprefix(BOM).lstrip()
    if not first.startswith((b"{", b"[")):
        return chain(lines, stream), ()
    if first.startswith(b"{") and _is_object(first):
        more = list(_lines_until_text(stream))
        if any(line.strip() for line in more):
            return chain(lines, more, stream), ()
    content = b"".join(chain(lines, stream)).removeprefix(BOM)
    text = content.decode("utf-8", "surrogateescape")
    start = _skip_blank(text, 0)
    if text[start] == "[":
        return (), _array_rows(text, start, name, whole=True)
    try:
        return (), _object_rows(text, start, name)
    except DataError:
        if _second_line_is_object(content):
            return io.BytesIO(content), ()
        raise


def refuse_json_array(stream: io.BufferedReader[Any], name: str) -> None:
    """Refuse a file named as JSON Lines that is one JSON array; nothing is read from the stream.

    Raises:
        DataError: it begins with an array of objects that ends on no line of its own.
    """
    head = stream.peek(1 << 16).removeprefix(BOM).lstrip()
    if not _ARRAY_OF_OBJECTS.match(head):
        return
    first, _, rest = head.partition(b"\n")
    try:
        json.loads(first)
        is_row = bool(rest.strip())  # a list a line: each is told of as a row
    except (ValueError, RecursionError):
        is_row = False
    if not is_row:
        reason = "is one JSON array, and a file of this name holds one object a line"
        raise DataError(name, reason=reason, hint=f"name it .json: {re.sub(r'[.](jsonl|ndjson)', '.json', name)}")


def _lines_until_text(stream: BinaryIO) -> Iterator[bytes]:
    """Read lines up to and with the first that is not blank."""
    for line in stream:
        yield line
        if line.removeprefix(BOM).strip():
            return


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode()), dict)
    except (ValueError, RecursionError):
        return False


def _second_line_is_object(content: bytes) -> bool:
    stream = io.BytesIO(content)
    for _ in _lines_until_text(stream):
        pass
    return any(_is_object(line) for line in _lines_until_text(stream))


def _object_rows(text: str, start: int, name: str) -> Iterable[ParsedRow]:
    """Read the rows of the file's one object: those of the array in it, else itself."""
    members, end = _members(text, start, name)
    _expect_end(text, end, name)
    _refuse_pandas({key: value for key, (_, value) in members.items()}, name)
    arrays = [key for key, (_, value) in members.items() if isinstance(value, list) and any(map(_is_dict, value))]
    if not arrays or FIELDS & set(members):
        line = text.count("\n", 0, start) + 1
        return [(line, _check_row(text[start:end], {k: v for k, (_, v) in members.items()}, f"{name}:{line}"))]
    if len(arrays) > 1:
        reason = f"holds several arrays: {', '.join(arrays)}"
        raise DataError(name, reason=reason, hint="keep one array of rows in a file")
    return _array_rows(text, members[arrays[0]][0], name)


def _refuse_pandas(members: dict[str, Any], name: str) -> None:
    """Refuse a table that pandas wrote otherwise than by ``orient="records"``."""
    tables = [value for value in members.values() if isinstance(value, dict) and value]
    alike = bool(tables) and len(tables) == len(members) and all(t.keys() == tables[0].keys() for t in tables)
    orient = None
    if alike and all(key.isdecimal() for key in tables[0]):
        orient = "columns"
    elif alike and all(key.isdecimal() for key in members):
        orient = "index"
    elif {"columns", "data"} <= members.keys() and isinstance(members["data"], list):
        orient = "split" if all(isinstance(row, list) for row in members["data"]) else None
    if orient is not None:
        reason = f"is a table as pandas writes it with orient='{orient}', and rows are objects"
        hint = "df.to_json('FILE.jsonl', orient='records', lines=True)"
        raise DataError(name, reason=reason, hint=hint)


def _is_dict(value: object) -> bool:
    return isinstance(value, dict)


def _members(text: str, start: int, name: str) -> tuple[dict[str, tuple[int, Any]], int]:
    """Parse the object at ``start``: ``{key: (where its value begins, value)}``, and where the object ends."""
    members: dict[str, tuple[int, Any]] = {}
    at = _skip_blank(text, start + 1)
    while text[at : at + 1] != "}" or members:
        if text[at : at + 1] != '"':
            raise _broken_json(text, at, name, "Expecting property name enclosed in double quotes")
        key, at = _parse_value(text, at, name)
        begin = _expect(text, at, ":", name)
        value, end = _parse_value(text, begin, name)
        members[key] = (begin, value)
        at = _skip_blank(text, end)
        if text[at : at + 1] == "}":
            break
        at = _expect(text, at, ",", name)
    return members, at + 1


def _array_rows(text: str, start: int, name: str, whole: bool = False) -> Iterator[ParsedRow]:
    """Parse the elements of the array at ``start``, one by one; with ``whole``, nothing may follow the array."""
    at = _skip_blank(text, start + 1)
    number, line, counted, by_line = 0, 1, 0, True
    while text[at : at + 1] != "]" or number:
        value, end = _parse_value(text, at, name)
        after = _skip_blank(text, end)
        number += 1
        line, counted = line + text.count("\n", counted, at), at
        if number == 1 and text[after : after + 1] == ",":
            by_line = "\n" in text[at : _skip_blank(text, after + 1)]
        shown = line if by_line else number
        yield shown, _check_row(text[at:end], value, f"{name}:{shown}")
        at = after
        if text[at : at + 1] == "]":
            break
        at = _expect(text, at, ",", name)
    if whole:
        _expect_end(text, at + 1, name)


def _check_row(raw: str, value: Any, where: str) -> dict[str, Any] | RejectedRow:
    try:
        raw.encode()
    except UnicodeEncodeError as error:
        return reject_non_utf8(where, raw, f"character {error.start} of the row")
    return value if isinstance(value, dict) else reject_non_object(where, value, raw)


def _parse_value(text: str, at: int, name: str) -> tuple[Any, int]:
    """Parse the JSON value at a place; return it and where it ends."""
    try:
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise _broken_json(text, error.pos, name, error.msg) from error
    except (ValueError, RecursionError) as error:
        raise _broken_json(text, at, name, describe_json_error(error)) from error


def _skip_blank(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None, "the pattern matches nothing too"
    return found.end()


def _expect(text: str, at: int, mark: str, name: str) -> int:
    """Return the place of what follows ``mark``, which must stand at ``at``."""
    at = _skip_blank(text, at)
    if text[at : at + 1] != mark:
        raise _broken_json(text, at, name, f"Expecting {mark!r}")
    return _skip_blank(text, at + 1)


def _expect_end(text: str, at: int, name: str) -> None:
    at = _skip_blank(text, at)
    if at < len(text):
        raise _broken_json(text, at, name, "more text after the file's one value")


def _broken_json(text: str, at: int, name: str, reason: str) -> DataError:
    line = text.count("\n", 0, at) + 1
    hint = "fix it there, or bring JSONL (one object a line), where one broken row costs no other"
    return DataError(f"{name}:{line}", reason=f"is not JSON ({reason})", hint=hint)
