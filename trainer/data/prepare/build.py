"""Build one prepared table, in bounded memory: chunks of rows in; tokens, rejected rows and findings out."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Features

from trainer.data.prepare.checks import check_controls, check_table
from trainer.data.prepare.encode import ROW_STATS, SCHEMA, TRUNCATED, EncodingSpec
from trainer.data.prepare.finding import Finding
from trainer.data.prepare.rejections import REJECTED_FILE, RejectionCounter, to_json_line
from trainer.data.prepare.table import COUNTS_FILE, HASHES_FILE, ROWS_FILE
from trainer.data.prepare.unused import check_unused
from trainer.data.prepare.workers import encode_chunks
from trainer.data.sources.open import Source
from trainer.tracking.counter import ProgressCounter

BIG_BYTES = 8_000_000  # below it, starting processes costs more than they save

logger = logging.getLogger(__name__)


def build(source: Source, spec: EncodingSpec, workers: int | None, folder: Path) -> dict[str, Any]:
    """Encode a source into a folder: ``rows.arrow``, ``counts.npy``, ``keys.npy``, ``refused.jsonl``.

    Args:
        source: the rows.
        spec: how they become tokens.
        workers: ``data.workers``.
        folder: an empty one.

    Returns:
        What the marker says of the table, as JSON can hold it: ``rows refused dropped truncated format findings``.

    Raises:
        DataError: the source or the template cannot be used, or a worker died.
        OSError: the folder cannot be written.
    """
    number = workers or _workers_for(source)
    name = source.names[0] if len(source.names) == 1 else f"{source.spec.path} ({len(source.names)} files)"
    what = f"preparing {name}" + (f" in {number} processes" if number > 1 else "")
    begin = time.monotonic()
    rejections, unused = RejectionCounter(spec.on_too_long, len(source.names) > 1), Counter[str]()
    parts = [np.empty(0, ROW_STATS)]
    rows = 0
    controls: set[str] = set()
    schema = Features.from_arrow_schema(SCHEMA).arrow_schema  # tells `datasets` of the columns
    with (
        ProgressCounter(what, unit="rows") as counter,
        closing(encode_chunks(source.chunks(), spec, number)) as chunks,
        pa.OSFile(str(folder / ROWS_FILE), "wb") as file,
        pa.ipc.new_stream(file, schema) as table,
        (folder / REJECTED_FILE).open("wb") as rejected,
    ):
        for chunk in chunks:
            if chunk.rows:
                table.write_batch(pa.ipc.read_record_batch(pa.py_buffer(chunk.rows), schema))
            parts.append(chunk.stats)
            rows += len(chunk.stats)
            rejections.add(chunk.rejected)
            unused.update(chunk.unused)
            controls |= chunk.controls
            rejected.writelines(map(to_json_line, chunk.rejected))
            counter.advance(len(chunk.stats))
    stats = np.concatenate(parts)
    np.save(folder / COUNTS_FILE, np.stack([stats["length"], stats["label_count"]]))
    np.save(folder / HASHES_FILE, np.stack([stats[name] for name in ("prefix_hash", "row_hash", "group_hash")]))
    if spec.group_by is not None:
        unused.pop(spec.group_by, None)
    findings = rejections.findings() + check_unused(unused, spec.format, spec.columns)
    findings += _check(source, spec, stats, controls)
    seconds = time.monotonic() - begin
    logger.info(f"prepared {rows:,} rows in {seconds:.1f} s, {rows / max(seconds, 1e-9):,.0f} rows/s")
    return {
        "rows": rows,
        "refused": rejections.refused,
        "dropped": rejections.dropped,
        "truncated": int(np.count_nonzero(stats["flags"] & TRUNCATED)),
        "format": spec.format,
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }


def _check(source: Source, spec: EncodingSpec, stats: np.ndarray, controls: set[str]) -> list[Finding]:
    def row_name(row: int) -> str:
        return f"{source.names[stats['file'][row]]}:{stats['line'][row]}"

    found = check_table(stats, row_name)
    found += check_controls(stats, sorted(controls), spec.control_tokens == "parse", row_name)
    if source.has_text_files and source.spec.text_unit == "line" and len(stats) > 1:
        what = "each line of a .txt file is a row, with an end token of its own"
        hint = "data.text_unit=paragraph or file, where lines belong together"
        found.append(Finding("text_unit", "note", len(stats), f"{what} → {hint}", ()))
    return found


def _workers_for(source: Source) -> int:
    """Choose one process a core that this one may use, when there is work enough."""
    size = sum(file.stat().st_size for file in source.files if file.is_file())
    return len(os.sched_getaffinity(0)) if size > BIG_BYTES else 1
