"""Held-out rows: disjoint from what is trained on, in rows and in prompts, and no more than asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.validation_split import split_rows
from trainer.errors import DataError

quick = settings(max_examples=100, deadline=None)
shares = st.floats(0.001, 0.999) | st.integers(0, 30)


@quick
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=60), shares, st.integers(0, 99))
def test_disjoint_by_prompt_and_no_more_than_asked(hashes: list[int], share: float, seed: int) -> None:
    rows = np.asarray(hashes, dtype=np.int64)
    wanted = round(share * len(rows)) if isinstance(share, float) else share
    if wanted >= len(rows):
        with pytest.raises(DataError, match=r"data\.validation"):
            split_rows(rows, share, seed)
        return
    train, held = split_rows(rows, share, seed)
    assert train.dtype == held.dtype == np.int64
    assert len(held) <= wanted
    assert len(train)
    assert not set(rows[train]) & set(rows[held])
    assert list(train) == sorted(set(train))
    assert list(held) == sorted(set(held))
    assert len(train) + len(held) == len(rows)
    assert set(held) == greedy(rows, wanted, seed)
    again = split_rows(rows, share, seed)
    assert all(np.array_equal(a, b) for a, b in zip((train, held), again, strict=True))


def greedy(hashes: np.ndarray, wanted: int, seed: int) -> set[int]:
    """What the docstring says: groups in a drawn order, each taken when it still fits."""
    groups = np.unique(hashes)
    held: set[int] = set()
    for group in np.random.default_rng([seed, 0]).permutation(len(groups)):
        rows = np.flatnonzero(hashes == groups[group])
        if len(held) + len(rows) <= wanted:
            held |= set(rows)
    return held


@quick
@given(st.integers(10, 200), st.floats(0.01, 0.9), st.integers(0, 99))
def test_unlike_prompts_give_exactly_what_is_asked_for(rows: int, share: float, seed: int) -> None:
    hashes = np.random.default_rng(seed).permutation(rows)
    held = split_rows(hashes, share, seed)[1]
    assert len(held) == round(share * rows)
    assert len(split_rows(hashes, rows - 1, seed)[1]) == rows - 1


def test_the_seed_decides_and_every_row_has_its_turn() -> None:
    hashes = np.arange(40)
    counts = np.zeros(40)
    for seed in range(400):
        counts[split_rows(hashes, 10, seed)[1]] += 1
    # binomial(400, 1/4): mean 100, deviation 8.7
    assert counts.min() > 60
    assert counts.max() < 140


@pytest.mark.parametrize("validation", [5, 50, 0.95])
def test_nothing_left_to_train_on(validation: float) -> None:
    with pytest.raises(DataError, match=r"data\.validation=.*would hold out all 5 rows"):
        split_rows(np.arange(5), validation, 0)


def test_zero_holds_out_none_and_one_prompt_cannot_be_split() -> None:
    assert [len(part) for part in split_rows(np.arange(5), 0, 0)] == [5, 0]
    assert [len(part) for part in split_rows(np.full(5, 7), 4, 0)] == [5, 0]
