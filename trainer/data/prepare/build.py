"""The building of one table, in bounded memory: chunks in; tokens, refused rows and findings out."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Features

from trainer.data.prepare.checks import RejectedCount, in_table
from trainer.data.prepare.encode import FACTS, SCHEMA, TRUNCATED, EncodingSpec
from trainer.data.prepare.workers import encoded
from trainer.data.sources.open import Source
from trainer.data.sources.rows import RejectedRow

TABLE_FILE = "rows.arrow"
REFUSED_FILE = "refused.jsonl"
BIG_BYTES = 8_000_000  # below it, starting processes costs more than they save
SAY_EVERY_SECONDS = 30


def build(
    source: Source, recipe: EncodingSpec, workers: int | None, folder: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Tokenise a source into a folder: ``rows.arrow``, ``counts.npy``, ``keys.npy``, ``refused.jsonl``.

    Args:
        source: the rows.
        recipe: how they become tokens.
        workers: ``data.workers``.
        folder: an empty one.
        say: told of the start, twice a minute of the progress, and of the end.

    Returns:
        What there is to know besides, as JSON can hold it: ``rows refused dropped truncated format findings``.

    Raises:
        DataError: the source or the template cannot be used, or a worker died.
        OSError: the folder cannot be written.
    """
    number = workers or _workers_for(source)
    name = source.names[0] if len(source.names) == 1 else f"{source.part.path} ({len(source.names)} files)"
    say(f"preparing {name}" + (f" in {number} processes" if number > 1 else ""))
    begin = said = time.monotonic()
    count = RejectedCount(recipe.on_too_long)
    pieces = [np.empty(0, FACTS)]
    rows = 0
    schema = Features.from_arrow_schema(SCHEMA).arrow_schema  # tells `datasets` of the columns
    with (
        closing(encoded(source.chunks(), recipe, number)) as batches,
        pa.OSFile(str(folder / TABLE_FILE), "wb") as file,
        pa.ipc.new_stream(file, schema) as table,
        (folder / REFUSED_FILE).open("wb") as refused,
    ):
        for batch in batches:
            if batch.rows:
                table.write_batch(pa.ipc.read_record_batch(pa.py_buffer(batch.rows), schema))
            pieces.append(batch.facts)
            rows += len(batch.facts)
            count.add(batch.refused)
            refused.writelines(_line(row) for row in batch.refused)
            if time.monotonic() - said > SAY_EVERY_SECONDS:
                said = time.monotonic()
                say(f"prepared {rows:,} rows so far")
    facts = np.concatenate(pieces)
    np.save(folder / "counts.npy", np.stack([facts["length"], facts["label_count"]]))
    np.save(folder / "keys.npy", np.stack([facts["prompt_key"], facts["row_key"]]))
    findings = count.findings() + in_table(
        facts, lambda row: f"{source.names[facts['file'][row]]}:{facts['line'][row]}"
    )
    seconds = time.monotonic() - begin
    say(f"prepared {rows:,} rows in {seconds:.1f} s, {rows / max(seconds, 1e-9):,.0f} rows/s")
    return {
        "rows": rows,
        "refused": count.refused,
        "dropped": count.dropped,
        "truncated": int(np.count_nonzero(facts["flags"] & TRUNCATED)),
        "format": recipe.format,
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }


def _workers_for(source: Source) -> int:
    """One process a core this one may use, when there is work enough."""
    size = sum(file.stat().st_size for file in source.files if file.is_file())
    return len(os.sched_getaffinity(0)) if size > BIG_BYTES else 1


def _line(row: RejectedRow) -> bytes:
    # a lone surrogate is no UTF-8; escaped with a backslash it is the JSON that it came from
    return json.dumps(dataclasses.asdict(row), ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
