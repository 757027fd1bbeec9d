"""Read plain text into rows: a line, a paragraph or the whole file each."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import Any

from trainer.data.sources.rows import BOM, ParsedRow, reject_non_utf8
from trainer.errors import DataError

MAX_LINE_BYTES = 64 << 20  # of decompressed text: a small file could otherwise ask for all memory there is


def bounded_lines(stream: io.BufferedReader[Any], name: str) -> Iterator[bytes]:
    """Read lines one by one.

    Raises:
        DataError: one is longer than ``MAX_LINE_BYTES``.
    """
    number = 1
    while line := stream.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES:
            reason = f"is longer than {MAX_LINE_BYTES >> 20} MiB, and a row is a line"
            raise DataError(f"{name}:{number}", reason=reason, hint="is it the right file?")
        yield line
        number += 1


def text_rows(stream: io.BufferedReader[Any], name: str, text_unit: str) -> Iterator[ParsedRow]:
    """Read the rows of a text file; what is blank is none. A row's line is the one on which it begins.

    Args:
        stream: the file's bytes.
        name: what it is called in messages.
        text_unit: ``line``, ``paragraph`` (lines between blank ones) or ``file``.

    Raises:
        DataError: a line, a paragraph or a whole file that is a row is longer than ``MAX_LINE_BYTES``.
    """
    if text_unit == "file":
        content = stream.read(MAX_LINE_BYTES + 1)
        if len(content) > MAX_LINE_BYTES:
            reason = f"is longer than {MAX_LINE_BYTES >> 20} MiB, and data.text_unit=file makes one row of it"
            raise DataError(name, reason=reason, hint="data.text_unit=paragraph")
        units: Iterable[tuple[int, bytes]] = [(1, content)]
    else:
        lines = enumerate(bounded_lines(stream, name), start=1)
        units = _paragraphs(lines, name) if text_unit == "paragraph" else lines
    for line, raw in units:
        raw = (raw.removeprefix(BOM) if line == 1 else raw).rstrip(b"\r\n")
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            yield line, reject_non_utf8(f"{name}:{line}", raw, f"byte {error.start}")
            continue
        if text.strip():
            yield line, {"text": text}


def _paragraphs(lines: Iterable[tuple[int, bytes]], name: str) -> Iterator[tuple[int, bytes]]:
    held: list[bytes] = []
    first = size = 0
    for number, line in lines:
        if line.removeprefix(BOM).strip():
            first = first if held else number
            held.append(line)
            size += len(line)
            if size > MAX_LINE_BYTES:
                reason = f"begins a paragraph that is longer than {MAX_LINE_BYTES >> 20} MiB"
                raise DataError(
                    f"{name}:{first}", reason=reason, hint="put blank lines between, or data.text_unit=line"
                )
        elif held:
            yield first, b"".join(held)
            held, size = [], 0
    if held:
        yield first, b"".join(held)
