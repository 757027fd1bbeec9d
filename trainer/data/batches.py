"""Which examples make step ``n``, and how they are laid on ranks and micro-batches.

Both are pure functions. ``global_batch`` depends on the seed and the step alone, so there is no cursor to save and a
resumed or resized run sees the same examples; ``split`` is computed alike on every rank, so nothing is communicated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

MICRO = list[int]  # indices into the global batch; an empty one contributes nothing


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

    def most_rows(self, longest: int) -> int:
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
    order = np.argsort(-lengths, kind="stable")
    needed = len(_cut(lengths[order], limits, None))
    per_rank = max(1, math.ceil(needed / world_size))
    pieces = _even_pieces(lengths[order], limits, per_rank * world_size)
    return _deal([[int(i) for i in order[begin:end]] for begin, end in pieces], per_rank, world_size)


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
    own, added = lengths.tolist(), (lengths - begins).tolist()
    per_rank = max(1, math.ceil(len(_cut_shared(own, added, limits, limits.tokens)) / world_size))
    low, high = 1, sum(own)
    while low < high:
        middle = (low + high) // 2
        if len(_cut_shared(own, added, limits, middle)) <= per_rank * world_size:
            high = middle
        else:
            low = middle + 1
    pieces = _cut_shared(own, added, limits, low)
    costs = [own[begin] + sum(added[begin + 1 : end]) for begin, end in pieces]
    by_cost = sorted(range(len(pieces)), key=lambda p: -costs[p])
    return _deal([list(range(*pieces[p])) for p in by_cost], per_rank, world_size), costs


def _cut_shared(own: list[int], added: list[int], limits: Limits, cost: int) -> list[tuple[int, int]]:
    """Cut sorted examples into runs of at most ``limits.rows`` examples, else at most ``cost`` nodes."""
    most_rows = limits.rows or len(own)
    pieces, begin, nodes = [], 0, 0
    for i in range(len(own)):
        if i > begin and (i - begin >= most_rows or nodes + added[i] > cost):
            pieces.append((begin, i))
            begin, nodes = i, 0
        nodes += added[i] if i > begin else own[i]
    return [*pieces, (begin, len(own))]


def _deal(micros: list[MICRO], per_rank: int, world_size: int) -> list[list[MICRO]]:
    """Give each rank ``per_rank`` micro-batches, forth and back, so that neighbours in cost meet in one forward."""
    micros = micros + [[] for _ in range(per_rank * world_size - len(micros))]
    out: list[list[MICRO]] = [[] for _ in range(world_size)]
    for k in range(per_rank):
        ranks = range(world_size) if k % 2 == 0 else range(world_size - 1, -1, -1)
        for rank, micro in zip(ranks, micros[k * world_size : (k + 1) * world_size], strict=True):
            out[rank].append(micro)
    return out


def _cut(sorted_lengths: np.ndarray, limits: Limits, cost: int | None) -> list[tuple[int, int]]:
    """Cut rows sorted from long to short into runs within the limits and, if given, within ``cost`` padded tokens."""
    pieces, begin = [], 0
    while begin < len(sorted_lengths):
        longest = int(sorted_lengths[begin])
        rows = limits.most_rows(longest)
        if cost is not None:
            rows = max(1, min(rows, cost // longest))
        end = min(begin + rows, len(sorted_lengths))
        pieces.append((begin, end))
        begin = end
    return pieces


def _even_pieces(sorted_lengths: np.ndarray, limits: Limits, count: int) -> list[tuple[int, int]]:
    """At most ``count`` runs whose largest padded cost is as small as can be (bisection on the cost)."""
    low, high = 1, int(sorted_lengths[0]) * len(sorted_lengths)
    while low < high:
        middle = (low + high) // 2
        if len(_cut(sorted_lengths, limits, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    return _cut(sorted_lengths, limits, low)
