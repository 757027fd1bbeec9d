"""How even the ranks' work is: against bounds that no cut can beat, against every cut, and on mixes of real shape."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.batching.micro_batch import Tokens
from trainer.data.batching.packing import Packing
from trainer.data.batching.rank_split import Limits

Rng = np.random.Generator


def example(ids: np.ndarray) -> Tokens:
    return Tokens(ids.astype(np.int32), np.arange(len(ids)) >= len(ids) - 5)


def headlines(rng: Rng, count: int) -> list[Tokens]:
    """30 to 60 tokens, 14 of them the question that all share."""
    question = rng.integers(0, 30000, 14)
    return [example(np.append(question, rng.integers(0, 30000, rng.integers(16, 47)))) for _ in range(count)]


def codes(rng: Rng, count: int) -> list[Tokens]:
    """About 79 tokens, 57 of them the instruction that all share."""
    instruction = rng.integers(0, 30000, 57)
    return [example(np.append(instruction, rng.integers(0, 30000, rng.integers(14, 31)))) for _ in range(count)]


def chat(rng: Rng, count: int) -> list[Tokens]:
    """Log-normal, 50 to 2000 tokens; one to five rows of a conversation share a prompt prefix."""
    out: list[Tokens] = []
    while len(out) < count:
        document, turns = rng.integers(0, 30000, 2000), int(rng.integers(1, 6))
        length = int(np.clip(rng.lognormal(6, 0.9), 50, 2000))
        for _ in range(turns):
            shared = int(length * rng.uniform(0.3, 0.9)) if turns > 1 else 0
            own = max(50 - shared, int(np.clip(rng.lognormal(4.5, 0.8), 10, 2000 - shared)))
            out.append(example(np.append(document[:shared], rng.integers(0, 30000, own))))
    return [out[i] for i in rng.permutation(count)]


MIXES = {"headlines": headlines, "codes": codes, "chat": chat}


def nodes(rows: Sequence[Tokens]) -> int:
    """Distinct prefixes, counted in a dictionary of dictionaries: the cost without ``trainer.data.batching.trie``."""
    root: dict[int, dict] = {}
    count = 0
    for row in rows:
        at = root
        for token in row.ids.tolist():
            if token not in at:
                at[token] = {}
                count += 1
            at = at[token]
    return count


def cost(packing: Packing, rows: Sequence[Tokens]) -> int:
    if not rows:
        return 1
    return nodes(rows) if packing.uses_trie else len(rows) * max(len(r.ids) for r in rows)


def common(rows: Sequence[Tokens]) -> int:
    shortest = min(len(r.ids) for r in rows)
    return next((d for d in range(shortest) if len({int(r.ids[d]) for r in rows}) > 1), shortest)


def micro_batch_costs(packing: Packing, rows: list[Tokens], world_size: int) -> np.ndarray:
    micros = packing.split(rows, world_size).micros
    return np.array([[cost(packing, [rows[i] for i in micro]) for micro in rank] for rank in micros])


def step_and_total(packing: Packing, rows: list[Tokens], world_size: int) -> tuple[int, int]:
    """Of a step: the slowest rank's k-th forward, summed over k, as ZeRO-3 meets at each; all of the busiest rank."""
    costs = micro_batch_costs(packing, rows, world_size)
    return int(costs.max(0).sum()), int(costs.sum(1).max())


def ideal(packing: Packing, rows: list[Tokens], world_size: int) -> float:
    """The tokens of one rank's split, evenly; no less than the longest example. What all share, every rank computes
    (or, with one example fewer than ranks, idles); and some rank has one example more than an even share."""
    one = packing.split(rows, 1).computed_tokens
    least = max(one / world_size, *(len(r.ids) for r in rows))
    if packing.uses_trie:
        prefix, per_rank = common(rows), -(-len(rows) // world_size)
        least = max(least, prefix + (nodes(rows) - prefix) / world_size)
        tails = sorted(len(r.ids) - prefix for r in rows)
        if prefix and all_differ_after(rows, prefix):
            least = max(least, prefix + sum(tails[:per_rank]))
    return least


def all_differ_after(rows: Sequence[Tokens], depth: int) -> bool:
    return len({int(r.ids[depth]) for r in rows if len(r.ids) > depth}) == len(rows)


@pytest.mark.parametrize("uses_trie", [False, True])
@pytest.mark.parametrize("mix", list(MIXES))
@pytest.mark.parametrize("count", [16, 32, 64, 128, 256])
def test_ranks_wait_little(mix: str, count: int, uses_trie: bool) -> None:
    """Within 1.15 of the ideal; where a rank has few examples of very unlike lengths, even the best cut is beyond that
    (the tests below prove it best, or nearly), and 1.3 is asked for."""
    packing = Packing(uses_trie, Limits(None, 4096), 0)
    for seed, world_size in itertools.product(range(2), (1, 2, 4, 8)):
        rows = MIXES[mix](np.random.default_rng(seed), count)
        few = mix == "chat" and count < 32 * world_size
        bound = (1.3 if few else 1.15) * ideal(packing, rows, world_size)
        step, total = step_and_total(packing, rows, world_size)
        assert step <= bound
        assert total <= bound


@pytest.mark.parametrize("mix", list(MIXES))
def test_a_small_budget_costs_little_evenness(mix: str) -> None:
    """1024 tokens a forward, rows of up to 2000: most forwards hold one or two rows."""
    for uses_trie, seed, world_size in itertools.product((False, True), range(2), (2, 8)):
        packing = Packing(uses_trie, Limits(None, 1024), 0)
        rows = MIXES[mix](np.random.default_rng(seed), 256)
        step, total = step_and_total(packing, rows, world_size)
        assert step <= 1.2 * ideal(packing, rows, world_size)
        assert total <= 1.15 * ideal(packing, rows, world_size)


@pytest.mark.parametrize("mix", ["codes", "chat"])
def test_little_is_computed_twice(mix: str) -> None:
    """No more than evenness asks for: each rank's own copy of what all share, and a tenth."""
    packing = Packing(True, Limits(None, 8192), 0)
    for seed, world_size in itertools.product(range(3), (2, 4, 8)):
        rows = MIXES[mix](np.random.default_rng(seed), 128)
        needed = nodes(rows) + (world_size - 1) * common(rows)
        assert packing.split(rows, world_size).computed_tokens <= 1.1 * needed


row = st.builds(
    lambda which, shared, tail: example(np.asarray([which] * shared + tail)),
    st.integers(90, 92),
    st.integers(0, 12),
    st.lists(st.integers(0, 3), min_size=1, max_size=12),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(row, min_size=1, max_size=6), st.integers(2, 3))
def test_near_the_best_of_all_cuts(rows: list[Tokens], world_size: int) -> None:
    """One trie a rank, against every way to deal the examples. 4/3 is what Graham proves of dealing by size where
    nothing is shared."""
    packing = Packing(True, Limits(None, 10**6), 0)

    def deals() -> Iterator[int]:
        for to in itertools.product(range(world_size), repeat=len(rows)):
            groups = [[r for r, rank in zip(rows, to, strict=True) if rank == k] for k in range(world_size)]
            yield max(nodes(g) for g in groups if g)

    assert step_and_total(packing, rows, world_size)[0] <= 4 / 3 * min(deals())


@pytest.mark.parametrize("uses_trie", [False, True])
@pytest.mark.parametrize("mix", list(MIXES))
def test_the_split_takes_no_time(mix: str, uses_trie: bool, record_property: pytest.RecordProperty) -> None:
    """Milliseconds for a thousand examples on eight ranks; the bound is for a busy machine."""
    packing = Packing(uses_trie, Limits(None, 4096), 0)
    rows = MIXES[mix](np.random.default_rng(0), 1024)
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        layout = packing.split(rows, 8)
        for micro in layout.micros[0]:
            packing.collate([rows[i] for i in micro], micro)
        seconds.append(time.perf_counter() - begin)
    per_token = min(seconds) / layout.computed_tokens
    print(f"{mix}: {min(seconds) * 1e3:.1f} ms, {layout.computed_tokens} computed tokens")
    record_property("nanoseconds a computed token", per_token * 1e9)
    assert min(seconds) < 0.2
