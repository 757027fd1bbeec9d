"""Split rows into training and held-out (validation) rows: seeded, disjoint, rows that begin alike on one side."""

from __future__ import annotations

import numpy as np

from trainer.errors import DataError


def join_groups(prefix_hashes: np.ndarray, opening_hashes: np.ndarray) -> np.ndarray:
    """Group rows that have one prompt prefix or one opening, directly or through other rows.

    Args:
        prefix_hashes: of each row's prompt prefix (tokens), int64, shape (rows,).
        opening_hashes: of what each row says up to the end of the first user turn (text).

    Returns:
        int64, shape (rows,), equal for rows of one group: its smallest prefix hash. So where the openings join nothing,
        these are the prefix hashes, and the split is what it was by those alone.
    """
    if not len(prefix_hashes):
        return prefix_hashes
    by_prefix, by_opening = (np.unique(h, return_inverse=True)[1] for h in (prefix_hashes, opening_hashes))
    labels = np.asarray(prefix_hashes)
    while True:
        joined = _smallest(_smallest(labels, by_opening), by_prefix)
        if np.array_equal(joined, labels):
            return labels
        labels = joined


def _smallest(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Give each row the smallest value of its group."""
    smallest = np.full(int(group.max()) + 1, np.iinfo(np.int64).max)
    np.minimum.at(smallest, group, values)
    return smallest[group]


def count_wanted(validation: int | float, rows: int) -> int:
    """Return how many of the rows ``data.validation`` asks for."""
    return round(validation * rows) if isinstance(validation, float) else validation


def split_rows(group_hashes: np.ndarray, validation: int | float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose the rows to train on and the rows to hold out.

    Whole groups of rows are held out, in an order drawn from the seed, as long as they fit: no row of a held-out group
    is ever trained on, and no more rows than asked for are held out.

    Args:
        group_hashes: of each row's group, int64, shape (rows,).
        validation: rows to hold out: a whole number, or a share below 1.
        seed: ``run.seed``.

    Returns:
        Row indices (int64, ascending): those to train on, those held out.

    Raises:
        DataError: nothing would be left to train on.
    """
    rows = len(group_hashes)
    wanted = count_wanted(validation, rows)
    if not wanted:
        return np.arange(rows), np.arange(0)
    random = np.random.default_rng([seed, 0])
    _, group, sizes = np.unique(group_hashes, return_inverse=True, return_counts=True)
    order = random.permutation(len(sizes))
    held = np.zeros(len(sizes), dtype=bool)
    held[_take_fitting(order, sizes, wanted)] = True
    is_held = held[group]
    train, validation_rows = np.flatnonzero(~is_held), np.flatnonzero(is_held)
    if not len(train):
        raise DataError(
            "data.validation",
            value=validation,
            reason=f"would hold out all {rows} rows",
            hint="hold out fewer, or bring more rows",
        )
    return train, validation_rows


def _take_fitting(order: np.ndarray, sizes: np.ndarray, room: int) -> np.ndarray:
    """Take groups one after the other, skipping those too big for the room that is left: by as many array operations as
    there are different sizes, where a loop would look at each group."""
    taken = []
    while len(order):
        order = order[sizes[order] <= room]
        fit = int(np.searchsorted(np.cumsum(sizes[order]), room, side="right"))
        taken.append(order[:fit])
        room -= int(sizes[order[:fit]].sum())
        order = order[fit:]
    return np.concatenate(taken) if taken else order
