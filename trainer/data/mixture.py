"""Several prepared tables read as one, and how often each part of a mixture is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset, concatenate_datasets

from trainer.config.dataset_spec import DatasetSpec
from trainer.data.prepare.prepare import Prepared
from trainer.errors import DataError


@dataclass(frozen=True, slots=True)
class Joined:
    """The tables of one or more parts, one behind the other; still memory-mapped.

    Attributes:
        parts: in the order of ``data.path``.
        table: their rows.
        lengths, label_counts: as in :class:`Prepared`, int32, shape (rows,).
        keys: prompt keys and answer keys, int64, shape (2, rows).
        begins: first row of each part, and the number of rows: int64, shape (parts + 1,).
    """

    parts: tuple[Prepared, ...]
    table: Dataset
    lengths: np.ndarray
    label_counts: np.ndarray
    keys: np.ndarray
    begins: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def row_name(self, row: int) -> str:
        """``file:line`` of a row."""
        number = int(np.searchsorted(self.begins, row, side="right")) - 1
        return self.parts[number].row_name(int(row) - int(self.begins[number]))


def join(parts: Sequence[Prepared]) -> Joined:
    """Tables as one; a single one is taken as it is."""
    begins = np.cumsum([0, *(len(p) for p in parts)], dtype=np.int64)
    if len(parts) == 1:
        one = parts[0]
        return Joined((one,), one.table, one.lengths, one.label_counts, one.keys, begins)
    return Joined(
        tuple(parts),
        concatenate_datasets([p.table for p in parts]),
        np.concatenate([p.lengths for p in parts]),
        np.concatenate([p.label_counts for p in parts]),
        np.concatenate([p.keys for p in parts], axis=1),
        begins,
    )


def mix(rows: np.ndarray, begins: np.ndarray, parts: Sequence[DatasetSpec], seed: int) -> np.ndarray:
    """Training rows as often as their parts' ``weight`` or ``rows`` say. A pure function.

    Args:
        rows: training rows over all parts, int64, ascending.
        begins: as in :class:`Joined`.
        parts: what was asked for.
        seed: ``run.seed``.

    Returns:
        Row indices, int64, ascending; a row that is used several times stands in it several times.

    Raises:
        DataError: ``rows`` of a part that has no training row.
    """
    cuts = np.searchsorted(rows, begins)
    out = [repeated(rows[cuts[number] : cuts[number + 1]], part, number, seed) for number, part in enumerate(parts)]
    return np.concatenate(out)


def repeated(rows: np.ndarray, part: DatasetSpec, number: int, seed: int) -> np.ndarray:
    """The training rows of one part, each used ``weight`` times, or so that they are ``rows`` in all; what is not a
    whole time is drawn by (seed, number of the part) without repetition.

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


def at_most(rows: np.ndarray, max_rows: int | None, seed: int) -> np.ndarray:
    """``data.max_rows`` of the training rows, drawn by the seed, ascending. More of them are the same ones and others,
    so that a longer trial trains on what a shorter one did."""
    if max_rows is None or max_rows >= len(rows):
        return rows
    return np.sort(np.random.default_rng([seed, 3]).permutation(rows)[:max_rows])
