"""Training and held-out rows: seeded, disjoint, and equal prompts on one side."""

from __future__ import annotations

import numpy as np

from trainer.errors import DataError


def split_rows(
    prompt_keys: np.ndarray, validation: int | float, max_rows: int | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which rows train and which are held out.

    Whole groups of rows with one prompt are held out, in an order drawn from the seed, as long as they fit; so no
    held-out prompt is ever trained on, and no more rows than asked for are held out.

    Args:
        prompt_keys: a hash of each row's prompt, int64, shape (rows,).
        validation: rows to hold out: a whole number, or a share below 1.
        max_rows: use only so many training rows, drawn by the seed; ``None`` uses all.
        seed: ``run.seed``.

    Returns:
        Row indices (int64, ascending): those to train on, those held out.

    Raises:
        DataError: nothing would be left to train on.
    """
    rows = len(prompt_keys)
    wanted = round(validation * rows) if isinstance(validation, float) else validation
    random = np.random.default_rng([seed, 0])
    _, group, sizes = np.unique(prompt_keys, return_inverse=True, return_counts=True)
    held_groups = np.zeros(len(sizes), dtype=bool)
    left = wanted
    for candidate in random.permutation(len(sizes)):
        if left == 0:
            break
        if sizes[candidate] <= left:
            held_groups[candidate] = True
            left -= int(sizes[candidate])
    held = held_groups[group]
    train, validation_rows = np.flatnonzero(~held), np.flatnonzero(held)
    if not len(train):
        raise DataError(
            "data.validation",
            value=validation,
            rule=f"would hold out all {rows} rows",
            cure="hold out fewer, or bring more rows",
        )
    if max_rows is not None and max_rows < len(train):
        train = np.sort(random.permutation(train)[:max_rows])
    return train, validation_rows
