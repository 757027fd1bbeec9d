"""The training and held-out rows of a run, and access to their tokens, lengths and names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from trainer.config.schema import BatchConfig
from trainer.data.batching.global_batch import total_steps
from trainer.data.batching.micro_batch import Tokens
from trainer.data.mixture import ConcatenatedTables
from trainer.data.prepare.finding import Finding
from trainer.data.prepare.table import PreparedTable


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of prepared tables, numbered from 0.

    Attributes:
        tables: one or more, read as one.
        indices: which of their rows, int64; one that a mixture uses several times stands in it several times.
    """

    tables: ConcatenatedTables
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens an example, int32, shape (rows,)."""
        return self.tables.lengths[self.indices]

    @property
    def prompt_lengths(self) -> np.ndarray:
        """Tokens before the last answer, int32, shape (rows,); 0 for plain text."""
        return self.tables.table.data.column("prompt_length").to_numpy()[self.indices]

    def texts(self, column: str) -> list[str]:
        """Return each row's ``answer``, or ``choices``: letters of its options, empty unless it is multiple choice."""
        return [str(text) for text in self.tables.table.data.column(column).take(pa.array(self.indices)).to_pylist()]

    def label_tokens(self, which: np.ndarray) -> int:
        """Count the tokens of some rows that are in the loss."""
        return int(self.tables.label_counts[self.indices[which]].sum())

    def unseen(self, ids: Sequence[int]) -> list[int]:
        """Return those of some token ids that stand in no row of the tables."""
        left = np.asarray(ids, np.int64)
        for chunk in self.tables.table.data.column("input_ids").chunks if len(left) else ():
            left = left[~np.isin(left, chunk.flatten().to_numpy())]
        return [int(number) for number in left]

    def examples(self, which: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """Return the records of some rows, in the order asked for."""
        if not len(which):
            return []
        columns = self.tables.table[[int(self.indices[i]) for i in which]]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def tokens(self, which: Sequence[int] | np.ndarray) -> list[Tokens]:
        """Return token ids and loss masks of some rows, in the order asked for, without a Python object a token."""
        wanted = [int(self.indices[i]) for i in which]
        if not wanted:
            return []
        table = self.tables.table.with_format("arrow")[wanted]
        ids, loss_mask = (table.column(name).combine_chunks() for name in ("input_ids", "labels"))
        ends = ids.offsets.to_numpy()[1:-1] - ids.offsets[0].as_py()
        flat_ids = ids.flatten().to_numpy()
        flat_mask = loss_mask.flatten().to_numpy(zero_copy_only=False)
        return [Tokens(*pair) for pair in zip(np.split(flat_ids, ends), np.split(flat_mask, ends), strict=True)]

    def row_name(self, row: int) -> str:
        """Return ``file:line`` of a row."""
        return self.tables.row_name(int(self.indices[row]))

    def names(self, which: Sequence[int] | np.ndarray) -> list[str]:
        """Return ``file:line`` of some rows."""
        return [self.row_name(int(i)) for i in which]


@dataclass(frozen=True, slots=True)
class Data:
    """The training and held-out rows of a run.

    Attributes:
        train: training rows.
        validation: held-out rows; empty when none are held out.
        fingerprint: digest of all tables and of the split; a resumed run must find the same.
        end_ids: token ids that end an answer, as the template writes them.
        parts: the tables, in the order of ``data.path``; a validation file's comes last.
        findings: what was found in them, and between them.
        opening_ids: what the template has the model write before what it says, as most do not.
    """

    train: Rows
    validation: Rows
    fingerprint: str
    end_ids: tuple[int, ...]
    parts: tuple[PreparedTable, ...]
    findings: tuple[Finding, ...]
    opening_ids: tuple[int, ...] = ()

    def total_steps(self, batch: BatchConfig) -> int:
        """Count the optimizer steps of the whole run."""
        return total_steps(len(self.train), batch.global_size, batch.epochs, batch.max_steps)
