"""Read CSV and TSV files record by record: quotes that span lines, bytes that are no UTF-8, missing fields."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from trainer.data.sources.rows import BOM, ParsedRow, RejectedRow, reject, reject_non_utf8
from trainer.errors import DataError


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
        if self.size < 1 << 16:  # an unclosed quote runs to the file's end; only its start is ever shown
            self.raw.append(text)
            self.size += len(text)
        return text


def read_csv(stream: Iterable[bytes], delimiter: str, name: str) -> Iterator[ParsedRow]:
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
