"""Files into chunks of rows: how each kind of file is opened and walked through, in constant memory where it can be."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.data.sources.json_arrays import BOM, json_rows
from trainer.data.sources.rows import CHUNK_LINES, Chunk, RejectedRow, not_utf8, refused
from trainer.errors import DataError

CHUNK_BYTES = 8 << 20
CODECS = {".gz": "gzip", ".zst": "zstd"}
TEXT_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".text")
TABLE_KINDS = (".parquet", ".arrow")
KNOWN = f"{', '.join(TEXT_KINDS + TABLE_KINDS)}; all but the last two also as .gz or .zst"

# its byte-order marks, or two Latin letters in either byte order
_UTF_16 = re.compile(rb"\xff\xfe|\xfe\xff|[^\0]\0[^\0]\0|\0[^\0]\0[^\0]", re.DOTALL)
_Parsed = tuple[int, dict[str, Any] | RejectedRow]


def detect_kind(path: Path) -> str | None:
    """The suffix that says how a file is read, the compression's left out; ``None`` when it is not known."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in CODECS:
        return suffixes[-2] if len(suffixes) == 2 and suffixes[-2] in TEXT_KINDS else None
    return suffixes[-1] if suffixes and suffixes[-1] in TEXT_KINDS + TABLE_KINDS else None


def read(path: Path, file: int, name: str) -> Iterator[Chunk]:
    """The rows of one file.

    Args:
        path: a file whose :func:`detect_kind` is known.
        file: its number in the source.
        name: what it is called in messages.

    Raises:
        DataError: it cannot be opened, is damaged, or is not of its kind.
    """
    kind = detect_kind(path)
    assert kind is not None, f"{path} must have been refused when the source was opened"
    with _told(name):
        if kind in TABLE_KINDS:
            tables = _parquet(path) if kind == ".parquet" else _arrow(path)
            yield from packed(numbered(_slices(tables), name), file, name)
            return
        with opened(path, name) as stream:
            yield from _text_chunks(stream, kind, file, name)


def _text_chunks(stream: io.BufferedReader[Any], kind: str, file: int, name: str) -> Iterator[Chunk]:
    if kind == ".json":
        lines, rows = json_rows(stream, name)
        yield from line_chunks(lines, file, name)
        yield from packed(rows, file, name)
    elif kind in (".csv", ".tsv"):
        yield from packed(_records(stream, "," if kind == ".csv" else "\t", name), file, name)
    elif kind in (".txt", ".text"):
        yield from packed(_texts(stream, name), file, name)
    else:
        yield from line_chunks(stream, file, name)


@contextmanager
def _told(name: str) -> Iterator[None]:
    """What goes wrong inside a library while a file is read, as one error that names the file."""
    try:
        yield
    except (OSError, EOFError, pa.ArrowException, ValueError, OverflowError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:160]
        reason, hint = f"cannot be read ({reason})", "check that the file is whole and what its name says"
        raise DataError(name, reason=reason, hint=hint) from error


@contextmanager
def opened(path: Path, name: str) -> Iterator[io.BufferedReader[Any]]:
    """A text file's bytes, unpacked.

    Raises:
        DataError: it is UTF-16.
    """
    codec = CODECS.get(path.suffix.lower())
    if codec and path.stat().st_size == 0:
        raise EOFError("Truncated compressed stream: the file is empty")
    # pyarrow reads through both codecs and, unlike zlib's own module, tells damage in one kind of error
    raw: Any = pa.input_stream(str(path), compression=codec) if codec else path.open("rb", buffering=0)
    with io.BufferedReader(raw, 1 << 20) as stream:
        if _UTF_16.match(stream.peek(4)):
            reason = "is UTF-16, and text is read as UTF-8"
            raise DataError(name, reason=reason, hint=f"iconv -f UTF-16 -t UTF-8 {path.name} > NEW-FILE")
        yield stream


def line_chunks(lines: Iterable[bytes], file: int, name: str) -> Iterator[Chunk]:
    """Lines of JSONL, ``CHUNK_LINES`` a chunk, fewer where they are long."""
    first, held, size = 1, [], 0
    for line in lines:
        held.append(line)
        size += len(line)
        if len(held) == CHUNK_LINES or size >= CHUNK_BYTES:
            yield Chunk(file, name, first, lines=tuple(held))
            first, held, size = first + len(held), [], 0
    if held:
        yield Chunk(file, name, first, lines=tuple(held))


def packed(rows: Iterable[_Parsed], file: int, name: str) -> Iterator[Chunk]:
    """Parsed rows, ``CHUNK_LINES`` a chunk."""
    rows = iter(rows)
    while held := tuple(islice(rows, CHUNK_LINES)):
        yield Chunk(file, name, held[0][0], rows=held)


class _Lines:
    """The lines of a CSV file for :mod:`csv`, which remembers those of the record being read."""

    def __init__(self, stream: Iterable[bytes]) -> None:
        self.stream = iter(stream)
        self.number = 0
        self.begin()

    def begin(self) -> None:
        """A new record starts with the next line."""
        self.raw, self.size, self.bad = list[str](), 0, ""

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self.stream)
        self.number += 1
        if self.number == 1:
            line = line.removeprefix(BOM)
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            self.bad = self.bad or f"line {self.number}, byte {error.start}"
            text = line.decode(errors="surrogateescape")
        if self.size < 1 << 16:  # an unclosed quote runs to the file's end; only its beginning is ever shown
            self.raw.append(text)
            self.size += len(text)
        return text


def _records(stream: Iterable[bytes], delimiter: str, name: str) -> Iterator[_Parsed]:
    """The records of a CSV file below its header line; ``line`` is the first line of each."""
    csv.field_size_limit(sys.maxsize)
    lines = _Lines(stream)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        lines.begin()
        line = lines.number + 1
        try:
            record: list[str] | csv.Error | None = next(reader, None)
        except csv.Error as error:
            record = error
        if record is None:
            return
        where = f"{name}:{line}"
        if isinstance(record, list) and not "".join(record).strip() and len(record) < 2:
            continue
        if header:
            yield line, _record(record, header, lines, where)
        else:
            header = _header(record, lines.bad, delimiter, where)


def _header(record: list[str] | csv.Error, bad: str, delimiter: str, where: str) -> list[str]:
    hint = "begin the file with one line of column names"
    if bad or isinstance(record, csv.Error):
        raise DataError(where, reason=f"has no header that can be read ({bad or record})", hint=hint)
    twice = sorted({column for column in record if record.count(column) > 1})
    if twice:
        raise DataError(where, reason=f"names a column twice ({', '.join(twice) or 'without a name'})", hint=hint)
    for other in {",", ";", "\t"} - {delimiter}:
        if len(record) == 1 and other in record[0]:
            reason = f"has its columns separated by {other!r}, and this kind of file by {delimiter!r}"
            raise DataError(where, reason=reason, hint="name it .tsv for tabs, .csv for commas, and save it with these")
    return record


def _record(
    record: list[str] | csv.Error, header: list[str], lines: _Lines, where: str
) -> dict[str, Any] | RejectedRow:
    raw = "".join(lines.raw)
    if lines.bad:
        return not_utf8(where, raw, lines.bad)
    if isinstance(record, csv.Error):
        last = f" and ends with line {lines.number}" if len(lines.raw) > 1 else ""
        reason = f"has quotes that do not fit{last} ({str(record).splitlines()[0]})"
        return refused(where, "wrong_type", reason, 'a field with quotes inside is written "say ""so"""', raw)
    if len(record) != len(header):
        code = "missing_field" if len(record) < len(header) else "wrong_type"
        reason = f"has {len(record)} fields, and the header names {len(header)}"
        return refused(where, code, reason, "quote fields that hold the separator or a line end", raw)
    return dict(zip(header, record, strict=True))


def _texts(stream: Iterable[bytes], name: str) -> Iterator[_Parsed]:
    for line, raw in enumerate(stream, start=1):
        raw = (raw.removeprefix(BOM) if line == 1 else raw).rstrip(b"\r\n")
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            yield line, not_utf8(f"{name}:{line}", raw, f"byte {error.start}")
            continue
        if text.strip():
            yield line, {"text": text}


def _parquet(path: Path) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path) as table:
        yield from table.iter_batches(batch_size=CHUNK_LINES)


def _arrow(path: Path) -> Iterator[pa.RecordBatch]:
    """An Arrow IPC file (Feather too), else a stream, which is what ``datasets`` writes under the same suffix."""
    with pa.memory_map(str(path)) as source:
        try:
            table = pa.ipc.open_file(source)
        except pa.ArrowInvalid:
            source.seek(0)
            yield from pa.ipc.open_stream(source)
            return
        for number in range(table.num_record_batches):
            yield table.get_batch(number)


def _slices(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Batches of at most ``CHUNK_LINES`` rows, fewer where the rows are big."""
    for batch in batches:
        names = batch.schema.names
        if len(set(names)) < len(names):
            raise ValueError(f"two columns have the name {next(n for n in names if names.count(n) > 1)}")
        fitting = CHUNK_BYTES * batch.num_rows // max(batch.nbytes, 1)
        step = min(CHUNK_LINES, max(1, fitting))
        yield from (batch.slice(start, step) for start in range(0, batch.num_rows, step))


def numbered(
    tables: Iterable[Any], name: str, rows_in: Callable[[Any], list[dict[str, Any]]] | None = None
) -> Iterator[_Parsed]:
    """Rows of tables, numbered from 1. ``rows_in`` takes a table's rows; without it they are Arrow's."""
    number = 0
    for table in tables:
        for row in rows_in(table) if rows_in else _rows(table):
            number += 1
            if isinstance(row, UnicodeDecodeError):
                yield number, not_utf8(f"{name}:{number}", row.object, f"byte {row.start}")
            else:
                yield number, row


def _rows(table: pa.RecordBatch) -> list[dict[str, Any] | UnicodeDecodeError]:
    """A table's rows; Arrow does not look into its texts, so one may turn out to be none."""
    try:
        return table.to_pylist()
    except UnicodeDecodeError as error:
        return [error] if table.num_rows == 1 else [_rows(table.slice(i, 1))[0] for i in range(table.num_rows)]
