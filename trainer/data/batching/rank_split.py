"""Split a global batch over ranks and micro-batches, even in cost, with the same number of micro-batches on each rank.

Pure functions of the rows' lengths: every rank computes the same split, so nothing is communicated. Rows for padded
micro-batches are grouped by length, rows for tries by shared prefix.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.data.batching.balance import Forest, balance_tries

Indices = list[int]  # a micro-batch as indices into the global batch; an empty one contributes nothing
MAX_CAPPED_ROUNDS = 4  # rounds of padded forwards that get a cap of their own; the long rows are in the first


@dataclass(frozen=True, slots=True)
class Limits:
    """What one device forward may hold: rows if ``rows`` is set, else computed (padded) tokens."""

    rows: int | None
    tokens: int

    def max_rows(self, longest: int) -> int:
        """Return how many rows may share a forward with a longest one of ``longest`` tokens; never less than one."""
        return self.rows if self.rows is not None else max(1, self.tokens // longest)


def split_padded(lengths: np.ndarray, world_size: int, limits: Limits) -> list[list[Indices]]:
    """Split examples over ranks and padded micro-batches.

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
    needed = len(_cut_by_length(sorted_lengths, 0, limits, None))
    per_rank = max(1, math.ceil(needed / world_size))
    rounds, costs, begin, cap = [], [], 0, 0
    for k in range(per_rank):
        if begin == len(order):
            break
        # Ranks meet at each forward, so the costliest of a round is what it takes; after the longest rows less will do.
        if k == 0 or (k < MAX_CAPPED_ROUNDS and world_size > 1):
            cap = _smallest_cap(sorted_lengths, begin, limits, (per_rank - k) * world_size, cap)
        runs = _cut_by_length(sorted_lengths, begin, limits, cap)[:world_size]
        rounds.append([order[b:e] for b, e in runs])
        costs.append([(e - b) * sorted_lengths[b] for b, e in runs])
        begin = runs[-1][1]
    return _assign_to_ranks(rounds, costs, per_rank, world_size)


def split_tries(
    lengths: np.ndarray, shared: np.ndarray, world_size: int, limits: Limits
) -> tuple[list[list[Indices]], list[int]]:
    """Split examples, sorted by their tokens, over ranks and tries: neighbours with a long shared prefix stay together.

    Args:
        lengths: tokens of each example, shape (examples,).
        shared: length of the prefix that each shares with its predecessor, shape (examples,).
        world_size: number of ranks.
        limits: what one forward may hold.

    Returns:
        As :func:`split_padded`; and the nodes of each trie that is not empty.
    """
    forest = Forest.from_lengths(lengths.tolist(), shared.tolist())
    max_rows = limits.rows or len(forest.lengths)
    max_nodes = forest.sums[-1] if limits.rows else limits.tokens
    per_rank = max(1, math.ceil(len(_cut_into_tries(forest, max_rows, max_nodes)) / world_size))
    low, high = min(max(forest.lengths), max_nodes), max_nodes
    while low < high:
        middle = (low + high) // 2
        if len(_cut_into_tries(forest, max_rows, middle)) <= per_rank * world_size:
            high = middle
        else:
            low = middle + 1
    runs = _cut_into_tries(forest, max_rows, low)
    tries = [(forest.nodes(b, e), list(range(b, e))) for b, e in runs]
    tries = balance_tries(forest, tries, world_size, per_rank, max_rows, max_nodes)
    tries.sort(key=lambda trie: -trie[0])
    chunks = [tries[k : k + world_size] for k in range(0, len(tries), world_size)]
    rounds, costs = [[m for _, m in chunk] for chunk in chunks], [[cost for cost, _ in chunk] for chunk in chunks]
    return _assign_to_ranks(rounds, costs, per_rank, world_size), [cost for cost, _ in tries]


def _cut_into_tries(forest: Forest, max_rows: int, max_nodes: int) -> list[tuple[int, int]]:
    """Cut sorted examples into runs, each as long as can be; a single example may have more nodes."""
    runs, begin, count = [], 0, len(forest.lengths)
    while begin < count:
        room = max_nodes - forest.lengths[begin] + forest.sums[begin + 1]
        end = min(max(begin + 1, bisect_right(forest.sums, room) - 1), begin + max_rows, count)
        runs.append((begin, end))
        begin = end
    return runs


def _assign_to_ranks(
    rounds: Sequence[Sequence[Indices]], costs: Sequence[Sequence[int]], per_rank: int, world_size: int
) -> list[list[Indices]]:
    """Give each rank one micro-batch a round, the costliest to the rank that has least so far."""
    out: list[list[Indices]] = [[] for _ in range(world_size)]
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


def rows_a_round(micros: Sequence[Sequence[Indices]]) -> list[int]:
    """Count the examples of all ranks in each round of ``micros[rank][k]``: the k-th micro-batches run side by side."""
    return [sum(map(len, together)) for together in zip(*micros, strict=True)]


def _cut_by_length(sorted_lengths: Sequence[int], begin: int, limits: Limits, cap: int | None) -> list[tuple[int, int]]:
    """Cut rows sorted from long to short, from ``begin`` on, into runs within the limits and within ``cap`` padded
    tokens, if given."""
    runs, count = [], len(sorted_lengths)
    while begin < count:
        longest = sorted_lengths[begin]
        rows = limits.max_rows(longest)
        if cap is not None:
            rows = max(1, min(rows, cap // longest))
        end = min(begin + rows, count)
        runs.append((begin, end))
        begin = end
    return runs


def _smallest_cap(sorted_lengths: Sequence[int], begin: int, limits: Limits, max_runs: int, known: int) -> int:
    """Return the least cap on padded tokens that cuts the rows from ``begin`` on into ``max_runs`` runs, by bisection.

    With a cap ``known`` to do (0: none is), it is only looked for whether a smaller one is worth it, to a part in 64.
    """
    low, high = sorted_lengths[begin], known or sorted_lengths[begin] * (len(sorted_lengths) - begin)
    while low < high - known // 64:
        middle = (low + high) // 2
        if len(_cut_by_length(sorted_lengths, begin, limits, middle)) <= max_runs:
            high = middle
        else:
            low = middle + 1
    return max(high, low)
