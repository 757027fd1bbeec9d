"""Read files into chunks of rows: each kind of file opened and walked through, in constant memory where it can be."""

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
from trainer.data.sources.rows import CHUNK_LINES, Chunk, ParsedRow, RejectedRow, reject, reject_non_utf8
from trainer.errors import DataError

CHUNK_BYTES = 8 << 20
CODECS = {".gz": "gzip", ".zst": "zstd"}
TEXT_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".text")
TABLE_KINDS = (".parquet", ".arrow")
KNOWN = f"{', '.join(TEXT_KINDS + TABLE_KINDS)}; all but the last two also as .gz or .zst"

# its byte-order marks, or two Latin letters in either byte order
_UTF_16 = re.compile(rb"\xff\xfe|\xfe\xff|[^\0]\0[^\0]\0|\0[^\0]\0[^\0]", re.DOTALL)


def detect_kind(path: Path) -> str | None:
    """Return the suffix that says how a file is read, the compression's left out; ``None`` when it is not known."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in CODECS:
        return suffixes[-2] if len(suffixes) == 2 and suffixes[-2] in TEXT_KINDS else None
    return suffixes[-1] if suffixes and suffixes[-1] in TEXT_KINDS + TABLE_KINDS else None


def read_chunks(path: Path, file: int, name: str) -> Iterator[Chunk]:
    """Read the rows of one file in chunks.

    Args:
        path: a file whose :func:`detect_kind` is known.
        file: its number in the source.
        name: what it is called in messages.

    Raises:
        DataError: it cannot be opened, is damaged, or is not of its kind.
    """
    kind = detect_kind(path)
    assert kind is not None, f"{path} must have been rejected when the source was opened"
    with _library_errors_as_data_error(name):
        if kind in TABLE_KINDS:
            tables = _read_parquet(path) if kind == ".parquet" else _read_arrow(path)
            yield from chunk_rows(number_rows(_slice_batches(tables), name), file, name)
            return
        with open_text(path, name) as stream:
            yield from _chunk_text(stream, kind, file, name)


def _chunk_text(stream: io.BufferedReader[Any], kind: str, file: int, name: str) -> Iterator[Chunk]:
    if kind == ".json":
        lines, rows = json_rows(stream, name)
        yield from chunk_lines(lines, file, name)
        yield from chunk_rows(rows, file, name)
    elif kind in (".csv", ".tsv"):
        yield from chunk_rows(_read_csv(stream, "," if kind == ".csv" else "\t", name), file, name)
    elif kind in (".txt", ".text"):
        yield from chunk_rows(_read_text_lines(stream, name), file, name)
    else:
        yield from chunk_lines(stream, file, name)


@contextmanager
def _library_errors_as_data_error(name: str) -> Iterator[None]:
    """Turn whatever a library raises while it reads a file into one error that names the file."""
    try:
        yield
    except (OSError, EOFError, pa.ArrowException, ValueError, OverflowError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:160]
        reason, hint = f"cannot be read ({reason})", "check that the file is whole and what its name says"
        raise DataError(name, reason=reason, hint=hint) from error


@contextmanager
def open_text(path: Path, name: str) -> Iterator[io.BufferedReader[Any]]:
    """Open a text file's bytes, decompressed.

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


def chunk_lines(lines: Iterable[bytes], file: int, name: str) -> Iterator[Chunk]:
    """Group lines of JSONL, ``CHUNK_LINES`` a chunk, fewer where they are long."""
    first, held, size = 1, [], 0
    for line in lines:
        held.append(line)
        size += len(line)
        if len(held) == CHUNK_LINES or size >= CHUNK_BYTES:
            yield Chunk(file, name, first, lines=tuple(held))
            first, held, size = first + len(held), [], 0
    if held:
        yield Chunk(file, name, first, lines=tuple(held))


def chunk_rows(rows: Iterable[ParsedRow], file: int, name: str) -> Iterator[Chunk]:
    """Group parsed rows, ``CHUNK_LINES`` a chunk."""
    rows = iter(rows)
    while held := tuple(islice(rows, CHUNK_LINES)):
        yield Chunk(file, name, held[0][0], rows=held)


class _CsvLines:
    """The lines of a CSV file for :mod:`csv`; keeps those of the record being read."""

    def __init__(self, stream: Iterable[bytes]) -> None:
        self.stream = iter(stream)
        self.number = 0
        self.begin_record()

    def begin_record(self) -> None:
        """Forget the lines of the last record."""
        self.raw, self.size, self.bad = list[str](), 0, ""

    def __iter__(self) -> _CsvLines:
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


def _read_csv(stream: Iterable[bytes], delimiter: str, name: str) -> Iterator[ParsedRow]:
    """Read the records of a CSV file below its header line; ``line`` is the first line of each."""
    csv.field_size_limit(sys.maxsize)
    lines = _CsvLines(stream)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        lines.begin_record()
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
            yield line, _parse_record(record, header, lines, where)
        else:
            header = _parse_header(record, lines.bad, delimiter, where)


def _parse_header(record: list[str] | csv.Error, bad: str, delimiter: str, where: str) -> list[str]:
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


def _parse_record(
    record: list[str] | csv.Error, header: list[str], lines: _CsvLines, where: str
) -> dict[str, Any] | RejectedRow:
    raw = "".join(lines.raw)
    if lines.bad:
        return reject_non_utf8(where, raw, lines.bad)
    if isinstance(record, csv.Error):
        last = f" and ends with line {lines.number}" if len(lines.raw) > 1 else ""
        reason = f"has quotes that do not fit{last} ({str(record).splitlines()[0]})"
        return reject(where, "wrong_type", reason, 'a field with quotes inside is written "say ""so"""', raw)
    if len(record) != len(header):
        code = "missing_field" if len(record) < len(header) else "wrong_type"
        reason = f"has {len(record)} fields, and the header names {len(header)}"
        return reject(where, code, reason, "quote fields that hold the separator or a line end", raw)
    return dict(zip(header, record, strict=True))


def _read_text_lines(stream: Iterable[bytes], name: str) -> Iterator[ParsedRow]:
    """Read a text file, one row a line that is not blank."""
    for line, raw in enumerate(stream, start=1):
        raw = (raw.removeprefix(BOM) if line == 1 else raw).rstrip(b"\r\n")
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            yield line, reject_non_utf8(f"{name}:{line}", raw, f"byte {error.start}")
            continue
        if text.strip():
            yield line, {"text": text}


def _read_parquet(path: Path) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path) as table:
        yield from table.iter_batches(batch_size=CHUNK_LINES)


def _read_arrow(path: Path) -> Iterator[pa.RecordBatch]:
    """Read an Arrow IPC file (Feather too), else a stream, which is what ``datasets`` writes under the same suffix."""
    with pa.memory_map(str(path)) as source:
        try:
            table = pa.ipc.open_file(source)
        except pa.ArrowInvalid:
            source.seek(0)
            yield from pa.ipc.open_stream(source)
            return
        for number in range(table.num_record_batches):
            yield table.get_batch(number)


def _slice_batches(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Slice batches to at most ``CHUNK_LINES`` rows, fewer where the rows are big."""
    for batch in batches:
        names = batch.schema.names
        if len(set(names)) < len(names):
            raise ValueError(f"two columns have the name {next(n for n in names if names.count(n) > 1)}")
        fitting = CHUNK_BYTES * batch.num_rows // max(batch.nbytes, 1)
        step = min(CHUNK_LINES, max(1, fitting))
        yield from (batch.slice(start, step) for start in range(0, batch.num_rows, step))


def number_rows(
    tables: Iterable[Any], name: str, to_rows: Callable[[Any], list[dict[str, Any]]] | None = None
) -> Iterator[ParsedRow]:
    """Number the rows of tables from 1. ``to_rows`` gives a table's rows; without it the tables are Arrow's."""
    number = 0
    for table in tables:
        for row in to_rows(table) if to_rows else _to_rows(table):
            number += 1
            if isinstance(row, UnicodeDecodeError):
                yield number, reject_non_utf8(f"{name}:{number}", row.object, f"byte {row.start}")
            else:
                yield number, row


def _to_rows(table: pa.RecordBatch) -> list[dict[str, Any] | UnicodeDecodeError]:
    """Return a table's rows; Arrow does not look into its texts, so one may turn out to be no UTF-8."""
    try:
        return table.to_pylist()
    except UnicodeDecodeError as error:
        return [error] if table.num_rows == 1 else [_to_rows(table.slice(i, 1))[0] for i in range(table.num_rows)]
