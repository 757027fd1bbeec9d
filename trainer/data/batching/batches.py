"""Which examples make step ``n``, and how they are laid on ranks and micro-batches.

Both are pure functions. ``global_batch`` depends on the seed and the step alone, so there is no cursor to save and a
resumed or resized run sees the same examples; ``split`` is computed alike on every rank, so nothing is communicated.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.data.batching.balance import Forest, even_bins

MICRO = list[int]  # indices into the global batch; an empty one contributes nothing
CAPS = 4  # rounds of padded forwards that get a cap of their own; the long rows are in the first


def total_steps(rows: int, global_size: int, epochs: float, max_steps: int | None) -> int:
    """Updates in a run: enough for ``epochs`` passes over ``rows``, at most ``max_steps``, at least one."""
    steps = max(1, math.ceil(epochs * rows / global_size - 1e-9))
    return min(steps, max_steps) if max_steps is not None else steps


def ends_epoch(step: int, rows: int, global_size: int) -> bool:
    """Whether step ``step`` (from 0) draws the last row of a pass over the data."""
    return (step + 1) * global_size // rows > step * global_size // rows


def global_batch(seed: int, step: int, rows: int, global_size: int) -> np.ndarray:
    """The rows of one update.

    The stream of passes over the data, each in an order of its own, is cut into pieces of ``global_size``; a piece may
    reach over the end of a pass, so each update has exactly ``global_size`` examples.

    Args:
        seed: ``run.seed``.
        step: from 0.
        rows: training rows.
        global_size: examples an update, at most ``rows``.

    Returns:
        int64 array of shape (global_size,), values in [0, rows).
    """
    positions = np.arange(step * global_size, (step + 1) * global_size, dtype=np.int64)
    epochs, offsets = np.divmod(positions, rows)
    out = np.empty(global_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        out[here] = permute(offsets[here], rows, seed, int(epoch))
    return out


def permute(indices: np.ndarray, rows: int, seed: int, epoch: int) -> np.ndarray:
    """Images of some indices under a keyed bijection of [0, rows): O(len(indices)) time and memory, no table.

    A Feistel network (Luby & Rackoff, 1988) of six rounds permutes the next power of four; a value that falls outside
    [0, rows) is sent through again until it falls inside (cycle walking, Black & Rogaway, 2002).
    """
    half = max(1, ((rows - 1).bit_length() + 1) // 2)
    keys = np.random.SeedSequence([seed, 1, epoch]).generate_state(6, np.uint64)
    values = indices.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        values[outside] = _feistel(values[outside], half, keys)
        outside = values >= np.uint64(rows)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    low = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    left, right = values >> shift, values & low
    for round_key in keys:
        left, right = right, left ^ (_mix(right ^ round_key) & low)
    return (left << shift) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al., 2014); arithmetic is modulo 2^64 by intent."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


@dataclass(frozen=True, slots=True)
class Limits:
    """What one device forward may hold: rows if ``rows`` is set, else computed (padded) tokens."""

    rows: int | None
    tokens: int

    def max_rows(self, longest: int) -> int:
        """Rows that may share a forward with a longest one of ``longest`` tokens; never less than one."""
        return self.rows if self.rows is not None else max(1, self.tokens // longest)


def split(lengths: np.ndarray, world_size: int, limits: Limits) -> list[list[MICRO]]:
    """Lay examples on ranks and padded micro-batches.

    Rows of like length share a micro-batch, so little is padded. Each rank gets the same number of micro-batches:
    ZeRO-3 runs a collective a layer, and ranks that disagree on their number would wait for each other for ever. A
    rank without rows enough gets empty ones. The k-th micro-batches of all ranks are neighbours in cost.

    Args:
        lengths: tokens of each example, shape (examples,).
        world_size: number of ranks.
        limits: what one forward may hold.

    Returns:
        ``[rank][k] -> indices into lengths``; every index occurs exactly once.
    """
    order = np.argsort(-lengths, kind="stable").tolist()
    sorted_lengths = [int(n) for n in lengths[order]]
    needed = len(_cut(sorted_lengths, 0, limits, None))
    per_rank = max(1, math.ceil(needed / world_size))
    rounds, costs, begin, cap = [], [], 0, 0
    for k in range(per_rank):
        if begin == len(order):
            break
        # Ranks meet at each forward, so the costliest of a round is what it takes; after the longest rows less will do.
        if k == 0 or (k < CAPS and world_size > 1):
            cap = _least_cap(sorted_lengths, begin, limits, (per_rank - k) * world_size, cap)
        pieces = _cut(sorted_lengths, begin, limits, cap)[:world_size]
        rounds.append([order[b:e] for b, e in pieces])
        costs.append([(e - b) * sorted_lengths[b] for b, e in pieces])
        begin = pieces[-1][1]
    return _deal(rounds, costs, per_rank, world_size)


def split_shared(
    lengths: np.ndarray, begins: np.ndarray, world_size: int, limits: Limits
) -> tuple[list[list[MICRO]], list[int]]:
    """Lay examples, sorted by their tokens, on ranks and tries: neighbours that begin alike stay together.

    Args:
        lengths: tokens of each example, shape (examples,).
        begins: how many of them its predecessor has too, shape (examples,).
        world_size: number of ranks.
        limits: what one forward may hold.

    Returns:
        As :func:`split`; and the nodes of each trie that is not empty.
    """
    forest = Forest.of(lengths.tolist(), begins.tolist())
    max_rows = limits.rows or len(forest.own)
    max_nodes = forest.sums[-1] if limits.rows else limits.tokens
    per_rank = max(1, math.ceil(len(_cut_shared(forest, max_rows, max_nodes)) / world_size))
    low, high = min(max(forest.own), max_nodes), max_nodes
    while low < high:
        middle = (low + high) // 2
        if len(_cut_shared(forest, max_rows, middle)) <= per_rank * world_size:
            high = middle
        else:
            low = middle + 1
    runs = _cut_shared(forest, max_rows, low)
    micros = [(forest.nodes(b, e), list(range(b, e))) for b, e in runs]
    micros = even_bins(forest, micros, world_size, per_rank, max_rows, max_nodes)
    micros.sort(key=lambda m: -m[0])
    chunks = [micros[k : k + world_size] for k in range(0, len(micros), world_size)]
    rounds, costs = [[m for _, m in chunk] for chunk in chunks], [[cost for cost, _ in chunk] for chunk in chunks]
    return _deal(rounds, costs, per_rank, world_size), [cost for cost, _ in micros]


def _cut_shared(forest: Forest, max_rows: int, max_nodes: int) -> list[tuple[int, int]]:
    """Cut sorted examples into runs, each as long as can be; a single example may have more nodes."""
    pieces, begin, count = [], 0, len(forest.own)
    while begin < count:
        room = max_nodes - forest.own[begin] + forest.sums[begin + 1]
        end = min(max(begin + 1, bisect_right(forest.sums, room) - 1), begin + max_rows, count)
        pieces.append((begin, end))
        begin = end
    return pieces


def _deal(
    rounds: Sequence[Sequence[MICRO]], costs: Sequence[Sequence[int]], per_rank: int, world_size: int
) -> list[list[MICRO]]:
    """Give each rank one micro-batch a round, the costliest to the rank that has least so far."""
    out: list[list[MICRO]] = [[] for _ in range(world_size)]
    totals = [0] * world_size
    for micros, round_costs in zip(rounds, costs, strict=True):
        ranks = sorted(range(world_size), key=lambda r: (totals[r], r))
        by_cost = sorted(range(len(micros)), key=lambda m: -round_costs[m])
        for rank, m in zip(ranks, by_cost, strict=False):
            out[rank].append(micros[m])
            totals[rank] += round_costs[m]
        for rank in ranks[len(micros) :]:
            out[rank].append([])
    for rank_micros in out:
        rank_micros += [[] for _ in range(per_rank - len(rounds))]
    return out


def _cut(sorted_lengths: Sequence[int], begin: int, limits: Limits, cap: int | None) -> list[tuple[int, int]]:
    """Cut rows sorted from long to short, from ``begin`` on, into runs within the limits and within ``cap`` padded
    tokens, if given."""
    pieces, count = [], len(sorted_lengths)
    while begin < count:
        longest = sorted_lengths[begin]
        rows = limits.max_rows(longest)
        if cap is not None:
            rows = max(1, min(rows, cap // longest))
        end = min(begin + rows, count)
        pieces.append((begin, end))
        begin = end
    return pieces


def _least_cap(sorted_lengths: Sequence[int], begin: int, limits: Limits, pieces: int, known: int) -> int:
    """The smallest largest padded cost of at most ``pieces`` runs of the rows from ``begin`` on, by bisection.

    With a cap ``known`` to do (0: none is), it is only looked for whether a smaller one is worth it, to a part in 64.
    """
    low, high = sorted_lengths[begin], known or sorted_lengths[begin] * (len(sorted_lengths) - begin)
    while low < high - known // 64:
        middle = (low + high) // 2
        if len(_cut(sorted_lengths, begin, limits, middle)) <= pieces:
            high = middle
        else:
            low = middle + 1
    return max(high, low)
