"""How padded rows are split over ranks and micro-batches: each once, within the limits, as many on every rank."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.batching.rank_split import Limits, split_padded

quick = settings(max_examples=60, deadline=None)

lengths_of_rows = st.lists(st.integers(1, 300), min_size=1, max_size=50).map(lambda x: np.asarray(x, dtype=np.int32))
limits_of_a_forward = st.builds(Limits, st.none() | st.integers(1, 9), st.integers(8, 900))


@quick
@given(lengths_of_rows, st.integers(1, 9), limits_of_a_forward)
def test_split_is_exact_even_and_within_limits(lengths: np.ndarray, world_size: int, limits: Limits) -> None:
    layout = split_padded(lengths, world_size, limits)
    assert len(layout) == world_size
    assert len({len(micros) for micros in layout}) == 1, "ZeRO-3 would hang"
    assert sorted(i for micros in layout for micro in micros for i in micro) == list(range(len(lengths)))
    for micro in (m for micros in layout for m in micros if m):
        if limits.rows is not None:
            assert len(micro) <= limits.rows
        else:
            assert len(micro) == 1 or len(micro) * lengths[micro].max() <= limits.tokens
    assert layout == split_padded(lengths.copy(), world_size, limits)


@quick
@given(lengths_of_rows, st.integers(1, 6), limits_of_a_forward)
def test_no_more_micro_batches_than_needed(lengths: np.ndarray, world_size: int, limits: Limits) -> None:
    """The fewest forwards that hold the rows, longest first; then the fewest rounds of all ranks."""
    left, needed = sorted(lengths, reverse=True), 0
    while left:
        rows = limits.rows if limits.rows is not None else max(1, limits.tokens // int(left[0]))
        left, needed = left[rows:], needed + 1
    assert len(split_padded(lengths, world_size, limits)[0]) == math.ceil(needed / world_size)


@quick
@given(st.lists(st.integers(1, 40), min_size=1, max_size=7), st.integers(1, 3), st.integers(1, 4))
def test_the_costliest_forward_is_as_cheap_as_can_be(lengths: list[int], world_size: int, rows: int) -> None:
    """Against every way to cut the sorted rows into that many runs."""
    lengths_array = np.asarray(lengths)
    layout = split_padded(lengths_array, world_size, Limits(rows, 0))
    found = max(len(m) * int(lengths_array[m].max()) for micros in layout for m in micros if m)
    ordered, pieces = sorted(lengths, reverse=True), world_size * len(layout[0])

    def best(begin: int, left: int) -> float:
        if begin == len(ordered):
            return 0
        if left == 0:
            return math.inf
        ends = range(begin + 1, min(begin + rows, len(ordered)) + 1)
        return min(max((end - begin) * ordered[begin], best(end, left - 1)) for end in ends)

    assert found == best(0, pieces)
