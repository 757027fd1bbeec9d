"""Training and held-out rows: seeded, disjoint, and equal openings on one side."""

from __future__ import annotations

import numpy as np

from trainer.errors import DataError


def split_rows(prompt_keys: np.ndarray, validation: int | float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which rows train and which are held out.

    Whole groups of rows with one key are held out, in an order drawn from the seed, as long as they fit; so no
    held-out prompt is ever trained on, and no more rows than asked for are held out.

    Args:
        prompt_keys: a hash of what each row opens with, int64, shape (rows,).
        validation: rows to hold out: a whole number, or a share below 1.
        seed: ``run.seed``.

    Returns:
        Row indices (int64, ascending): those to train on, those held out.

    Raises:
        DataError: nothing would be left to train on.
    """
    rows = len(prompt_keys)
    wanted = round(validation * rows) if isinstance(validation, float) else validation
    if not wanted:
        return np.arange(rows), np.arange(0)
    random = np.random.default_rng([seed, 0])
    _, group, sizes = np.unique(prompt_keys, return_inverse=True, return_counts=True)
    order = random.permutation(len(sizes))
    held = np.zeros(len(sizes), dtype=bool)
    held[_that_fit(order, sizes, wanted)] = True
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


def _that_fit(order: np.ndarray, sizes: np.ndarray, room: int) -> np.ndarray:
    """Groups taken one after the other, those too big for the room that is left passed over: by as many array
    operations as there are different sizes, where a loop would look at each group."""
    taken = []
    while len(order):
        order = order[sizes[order] <= room]
        fit = int(np.searchsorted(np.cumsum(sizes[order]), room, side="right"))
        taken.append(order[:fit])
        room -= int(sizes[order[:fit]].sum())
        order = order[fit:]
    return np.concatenate(taken) if taken else order
