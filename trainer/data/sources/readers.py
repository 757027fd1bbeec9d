"""Read files into chunks of rows: each kind of file opened and walked through, in constant memory where it can be."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.data.sources.arrow_rows import convert_row, row_converters
from trainer.data.sources.csv_records import read_csv
from trainer.data.sources.json_arrays import json_rows, refuse_json_array
from trainer.data.sources.plain_text import bounded_lines, text_rows
from trainer.data.sources.rows import CHUNK_LINES, Chunk, ParsedRow, reject_non_utf8
from trainer.errors import DataError

CHUNK_BYTES = 8 << 20
CODECS = {".gz": "gzip", ".zst": "zstd"}
TEXT_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".text")
PLAIN_TEXT = (".txt", ".text")
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


def read_chunks(path: Path, file: int, name: str, text_unit: str = "line") -> Iterator[Chunk]:
    """Read the rows of one file in chunks.

    Args:
        path: a file whose :func:`detect_kind` is known.
        file: its number in the source.
        name: what it is called in messages.
        text_unit: what a row of plain text is.

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
            yield from _chunk_text(stream, kind, file, name, text_unit)


def _chunk_text(stream: io.BufferedReader[Any], kind: str, file: int, name: str, text_unit: str) -> Iterator[Chunk]:
    if kind == ".json":
        lines, rows = json_rows(stream, name)
        yield from chunk_lines(lines, file, name)
        yield from chunk_rows(rows, file, name)
    elif kind in (".csv", ".tsv"):
        yield from chunk_rows(read_csv(stream, "," if kind == ".csv" else "\t", name), file, name)
    elif kind in PLAIN_TEXT:
        yield from chunk_rows(text_rows(stream, name, text_unit), file, name)
    else:
        refuse_json_array(stream, name)
        yield from chunk_lines(bounded_lines(stream, name), file, name)


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


def number_rows(batches: Iterable[pa.RecordBatch | pa.Table], name: str) -> Iterator[ParsedRow]:
    """Number the rows of Arrow's tables from 1."""
    number = 0
    for batch in batches:
        converters = row_converters(batch.schema)
        for row in _to_rows(batch):
            number += 1
            if isinstance(row, UnicodeDecodeError):
                yield number, reject_non_utf8(f"{name}:{number}", row.object, f"byte {row.start}")
            else:
                yield number, convert_row(row, converters)


def _to_rows(table: pa.RecordBatch | pa.Table) -> list[dict[str, Any] | UnicodeDecodeError]:
    """Return a table's rows; Arrow does not look into its texts, so one may turn out to be no UTF-8."""
    try:
        return table.to_pylist()
    except UnicodeDecodeError as error:
        return [error] if table.num_rows == 1 else [_to_rows(table.slice(i, 1))[0] for i in range(table.num_rows)]
