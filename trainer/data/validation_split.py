"""Split rows into training and held-out (validation) rows: seeded, disjoint, equal prompt prefixes on one side."""

from __future__ import annotations

import numpy as np

from trainer.errors import DataError


def split_rows(prefix_hashes: np.ndarray, validation: int | float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose the rows to train on and the rows to hold out.

    Whole groups of rows with one prompt prefix are held out, in an order drawn from the seed, as long as they fit: no
    held-out prompt is ever trained on, and no more rows than asked for are held out.

    Args:
        prefix_hashes: of each row's prompt prefix, int64, shape (rows,).
        validation: rows to hold out: a whole number, or a share below 1.
        seed: ``run.seed``.

    Returns:
        Row indices (int64, ascending): those to train on, those held out.

    Raises:
        DataError: nothing would be left to train on.
    """
    rows = len(prefix_hashes)
    wanted = round(validation * rows) if isinstance(validation, float) else validation
    if not wanted:
        return np.arange(rows), np.arange(0)
    random = np.random.default_rng([seed, 0])
    _, group, sizes = np.unique(prefix_hashes, return_inverse=True, return_counts=True)
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
