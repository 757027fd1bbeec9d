"""Which rows make a step: bijections, exact counts, no dependence on history."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.batching.global_batch import ends_epoch, global_batch, permute, total_steps

quick = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 2**32)


@quick
@given(
    st.integers(1, 5000) | st.sampled_from([2**k + d for k in range(1, 12) for d in (-1, 0, 1)]),
    seeds,
    st.integers(0, 9),
)
def test_permute_is_a_bijection(rows: int, seed: int, epoch: int) -> None:
    image = permute(np.arange(rows), rows, seed, epoch)
    assert image.dtype == np.int64
    assert np.array_equal(np.sort(image), np.arange(rows))


@quick
@given(st.integers(1, 2**40), st.lists(st.integers(0, 2**40), max_size=5), seeds)
def test_permute_needs_no_neighbours(rows: int, asked: list[int], seed: int) -> None:
    indices = np.asarray([i % rows for i in asked], dtype=np.int64)
    together = permute(indices, rows, seed, 0)
    alone = [int(permute(np.asarray([i]), rows, seed, 0)[0]) for i in indices]
    assert list(together) == alone
    assert all(0 <= i < rows for i in alone)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])


@pytest.mark.parametrize("rows", [1000, 1024, 4097])
def test_epochs_and_seeds_are_uncorrelated(rows: int) -> None:
    bound = 4 / math.sqrt(rows)  # four deviations of the correlation of independent orders
    orders = [permute(np.arange(rows), rows, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for i, order in enumerate(orders):
        assert abs(rank_correlation(order, np.arange(rows))) < bound
        assert abs(rank_correlation(order[1:], order[:-1])) < bound
        for other in orders[:i]:
            assert abs(rank_correlation(order, other)) < bound
            assert np.mean(order == other) < 10 / rows


@pytest.mark.parametrize("rows", [2, 3, 5, 17])
def test_every_row_is_as_likely_in_every_place(rows: int) -> None:
    """Chi-square of (place, row) over many seeds against the uniform law, at five deviations."""
    trials = 1000
    counts = np.zeros((rows, rows))
    for seed in range(trials):
        counts[np.arange(rows), permute(np.arange(rows), rows, seed, 0)] += 1
    expected = trials / rows
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = (rows - 1) ** 2
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


@quick
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 4), seeds)
def test_each_pass_draws_each_row_exactly_once(rows: int, global_size: int, passes: int, seed: int) -> None:
    steps = math.ceil(passes * rows / global_size)
    batches = [global_batch(seed, step, rows, global_size) for step in range(steps)]
    assert all(b.shape == (global_size,) and b.dtype == np.int64 for b in batches)
    stream = np.concatenate(batches)
    for epoch in range(passes):
        assert sorted(stream[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


@quick
@given(st.integers(1, 10**6), st.integers(0, 10**6), st.integers(1, 64), seeds)
def test_a_batch_depends_on_seed_and_step_alone(rows: int, step: int, global_size: int, seed: int) -> None:
    batch = global_batch(seed, step, rows, global_size)
    np.random.default_rng(0).random(3)
    assert np.array_equal(batch, global_batch(seed, step, rows, global_size))
    # the same stream, cut into pieces of one
    one_by_one = [int(global_batch(seed, step * global_size + i, rows, 1)[0]) for i in range(global_size)]
    assert list(batch) == one_by_one


def test_passes_have_orders_of_their_own() -> None:
    first, second = (global_batch(0, epoch, 100, 100) for epoch in (0, 1))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, global_batch(1, 0, 100, 100))


@pytest.mark.parametrize(
    ("rows", "global_size", "epochs", "max_steps", "expected"),
    [
        (100, 10, 1.0, None, 10),
        (101, 10, 1.0, None, 11),
        (100, 10, 0.5, None, 5),
        (100, 10, 0.001, None, 1),
        (10, 3, 3.0, None, 10),
        (30, 1, 0.1, None, 3),  # 0.1 * 30 is a little more than 3
        (100, 10, 7.0, 12, 12),
        (100, 10, 1.0, 12, 10),
        (1, 1, 3.0, None, 3),
    ],
)
def test_total_steps(rows: int, global_size: int, epochs: float, max_steps: int | None, expected: int) -> None:
    assert total_steps(rows, global_size, epochs, max_steps) == expected


@quick
@given(st.integers(1, 50), st.integers(1, 120), st.integers(1, 5))
def test_ends_epoch_where_a_last_row_is_drawn(rows: int, global_size: int, passes: int) -> None:
    steps = math.ceil(passes * rows / global_size)
    for step in range(steps):
        drawn = range(step * global_size, (step + 1) * global_size)
        assert ends_epoch(step, rows, global_size) == any(position % rows == rows - 1 for position in drawn)
