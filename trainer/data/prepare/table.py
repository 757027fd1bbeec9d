"""Open a prepared table: the token ids and loss masks of one data set, memory-mapped from its folder in the cache."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from datasets import Dataset

from trainer.data.prepare.finding import Finding
from trainer.data.prepare.rejections import REJECTED_FILE, read_rejected, summarize_hints, summarize_rows
from trainer.data.sources.open import Source
from trainer.data.sources.splits import LeftAlone
from trainer.errors import DataError

# The files of a table's folder, besides REJECTED_FILE.
ROWS_FILE = "rows.arrow"
COUNTS_FILE = "counts.npy"  # tokens and labels of each row
HASHES_FILE = "keys.npy"  # prompt prefix, whole row and its group in the split, hashed
MARKER = "COMPLETE"  # the table is whole; its text says what the other files do not
NAMED_REJECTED = 3


@dataclass(frozen=True, slots=True)
class PreparedTable:
    """The encoded rows of one data set.

    Attributes:
        table: memory-mapped columns ``file`` (which of ``names``), ``line`` (in it, from 1), ``input_ids``, ``labels``
            (the loss mask: which ids are in the loss), ``prompt_length``, ``answer`` and ``choices`` (texts).
        lengths: tokens a row, int32, shape (rows,).
        label_counts: tokens in the loss, a row, int32, shape (rows,).
        hashes: of the ids of each uncut row: of its prompt prefix, and of all of it; and of what groups it in the
            split (``grouping``); int64, shape (3, rows).
        fingerprint: hex digest of the source, the tokenizer and every config key that matters.
        names: the files, as they are called in messages.
        folder: where the table is; ``refused.jsonl`` in it holds every row that is not in the table.
        refused: rows that cannot be used.
        dropped: rows left out for their length.
        truncated: rows that were cut.
        format: the rows' format, never ``auto``.
        findings: what was found in the rows.
        files: absolute paths of what the rows were read from.
        left_alone: what lies beside them, and belongs to other splits.
    """

    table: Dataset
    lengths: np.ndarray
    label_counts: np.ndarray
    hashes: np.ndarray
    fingerprint: str
    names: tuple[str, ...]
    folder: Path
    refused: int
    dropped: int
    truncated: int
    format: str
    findings: tuple[Finding, ...]
    files: tuple[str, ...] = ()
    left_alone: tuple[LeftAlone, ...] = ()

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def refused_file(self) -> Path:
        """Every row that is not in the table, a JSON object a line: ``where reason message raw hint``."""
        return self.folder / REJECTED_FILE

    def row_name(self, row: int) -> str:
        """Return ``file:line`` of a row, for messages."""
        record = self.table[int(row)]
        return f"{self.names[record['file']]}:{record['line']}"


def open_table(folder: Path, source: Source, fingerprint: str) -> PreparedTable:
    """Open the table in a folder.

    Args:
        folder: of a complete table.
        source: that it was made from.
        fingerprint: of its tokens.

    Raises:
        DataError: not one row of the source could be used.
    """
    made = json.loads((folder / MARKER).read_text())
    if not made["rows"]:
        rejected = folder / REJECTED_FILE
        first = list(islice(read_rejected(rejected), NAMED_REJECTED))
        why = f": {summarize_rows(first)}; all of them are in {rejected}" if first else ", it is empty"
        hint = summarize_hints(first) or "fix the rows"
        raise DataError("data.path", value=source.spec.path, reason=f"holds no usable row{why}", hint=hint)
    table = Dataset.from_file(str(folder / ROWS_FILE))
    lengths, label_counts = np.load(folder / COUNTS_FILE, mmap_mode="r")
    hashes = np.load(folder / HASHES_FILE, mmap_mode="r")
    findings = tuple(Finding(**{**found, "where": tuple(found["where"])}) for found in made["findings"])
    numbers = (made["refused"], made["dropped"], made["truncated"], made["format"])
    files = tuple(str(file.parent if source.table is not None else file) for file in source.files)
    of_source = (files, source.left_alone)
    return PreparedTable(
        *(table, lengths, label_counts, hashes, fingerprint, source.names, folder, *numbers, findings, *of_source)
    )
