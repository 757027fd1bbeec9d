"""Concatenate prepared tables, and mix their training rows by the parts' weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset, concatenate_datasets

from trainer.config.dataset_spec import DatasetSpec
from trainer.data.prepare.table import PreparedTable
from trainer.errors import DataError


@dataclass(frozen=True, slots=True)
class ConcatenatedTables:
    """The tables of one or more parts, one after the other; still memory-mapped.

    Attributes:
        parts: in the order of ``data.path``.
        table: their rows.
        lengths, label_counts: as in :class:`PreparedTable`, int32, shape (rows,).
        hashes: of prompt prefixes, of whole rows and of groups in the split, int64, shape (3, rows).
        starts: first row of each part, and the number of rows: int64, shape (parts + 1,).
    """

    parts: tuple[PreparedTable, ...]
    table: Dataset
    lengths: np.ndarray
    label_counts: np.ndarray
    hashes: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def row_name(self, row: int) -> str:
        """Return ``file:line`` of a row."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.parts[number].row_name(int(row) - int(self.starts[number]))


def concatenate_tables(parts: Sequence[PreparedTable]) -> ConcatenatedTables:
    """Concatenate tables; a single one is taken as it is."""
    starts = np.cumsum([0, *(len(p) for p in parts)], dtype=np.int64)
    if len(parts) == 1:
        one = parts[0]
        return ConcatenatedTables((one,), one.table, one.lengths, one.label_counts, one.hashes, starts)
    return ConcatenatedTables(
        tuple(parts),
        concatenate_datasets([p.table for p in parts]),
        np.concatenate([p.lengths for p in parts]),
        np.concatenate([p.label_counts for p in parts]),
        np.concatenate([p.hashes for p in parts], axis=1),
        starts,
    )


def mix_rows(rows: np.ndarray, starts: np.ndarray, parts: Sequence[DatasetSpec], seed: int) -> np.ndarray:
    """Repeat or sample training rows as their parts' ``weight`` or ``rows`` say. A pure function.

    Args:
        rows: training rows over all parts, int64, ascending.
        starts: as in :class:`ConcatenatedTables`.
        parts: what was asked for.
        seed: ``run.seed``.

    Returns:
        Row indices, int64, ascending; a row that is used several times stands in it several times.

    Raises:
        DataError: ``rows`` of a part that has no training row.
    """
    cuts = np.searchsorted(rows, starts)
    out = [repeat_rows(rows[cuts[number] : cuts[number + 1]], part, number, seed) for number, part in enumerate(parts)]
    return np.concatenate(out)


def repeat_rows(rows: np.ndarray, part: DatasetSpec, number: int, seed: int) -> np.ndarray:
    """Repeat the training rows of one part ``weight`` times each, or so that they are ``rows`` in all; what is not a
    whole time is sampled by (seed, number of the part) without replacement.

    Raises:
        DataError: ``rows`` are asked for and there is none.
    """
    if part.rows is not None and not len(rows):
        raise DataError(
            f"data.path[{number}].rows",
            value=part.rows,
            reason=f"{part.path} has no row to train on",
            hint="hold out fewer rows (data.validation)",
        )
    if not len(rows) or (part.rows is None and part.weight == 1):
        return rows
    wanted = part.rows if part.rows is not None else max(1, round(part.weight * len(rows)))
    times, rest = divmod(wanted, len(rows))
    counts = np.full(len(rows), times)
    counts[np.random.default_rng([seed, 2, number]).permutation(len(rows))[:rest]] += 1
    return np.repeat(rows, counts)


def limit_rows(rows: np.ndarray, max_rows: int | None, seed: int) -> np.ndarray:
    """Sample ``data.max_rows`` of the training rows by the seed, ascending. A larger sample holds a smaller one, so
    that a longer trial trains on what a shorter one did."""
    if max_rows is None or max_rows >= len(rows):
        return rows
    return np.sort(np.random.default_rng([seed, 3]).permutation(rows)[:max_rows])
