"""Balance the ranks' load: regroup examples into tries of even cost where runs of neighbours leave ranks waiting.

A run of neighbours shares most, but its cost comes in steps of an example: with few examples a rank, some rank has one
too many. Here subtrees are assigned one by one, the costliest first, each to the trie where it makes the step least
longer (longest processing time first: Graham, 1969), the prefix it shares with that trie taken off. A subtree that fits
nowhere is cut where its examples share least, so no more is computed twice than evenness asks for.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import accumulate, pairwise

SizedTrie = tuple[int, list[int]]  # nodes, and positions of the examples in sorted order
GOOD_ENOUGH = 1.05  # times the least possible: below it nothing better is looked for
MAX_TRIALS = 2048  # examples times tries: beyond it looking takes longer than ranks wait, and runs are even enough
# Target size of a trie, in even parts of the step; and the largest subtree that is assigned whole, as a share of that.
TARGETS = ((1.05, 1.0), (1.12, 1.0), (1.0, 0.0))


@dataclass(frozen=True, slots=True)
class Forest:
    """Examples sorted by their tokens, of which any run is a trie.

    Attributes:
        lengths: tokens of each.
        shared: length of the prefix that each shares with its predecessor; the first has 0.
        sums: ``sums[i]`` is the nodes of the trie of the first ``i`` examples; ascending.
    """

    lengths: list[int]
    shared: list[int]
    sums: list[int]

    @classmethod
    def from_lengths(cls, lengths: list[int], shared: list[int]) -> Forest:
        """Build a forest of at least one example."""
        return cls(lengths, shared, [0, *accumulate(n - s for n, s in zip(lengths, shared, strict=True))])

    def nodes(self, begin: int, end: int) -> int:
        """Count the nodes of the trie of a run."""
        return self.sums[end] - self.sums[begin] + self.shared[begin]

    def shortest_step(self, world_size: int) -> float:
        """Bound a step from below, in nodes a rank: the longest example; and on each rank the prefix that all examples
        share, with an even part of the rest."""
        common = min(self.shared[1:], default=0)
        return max(max(self.lengths), common + (self.sums[-1] - common) / world_size)

    def subtrees(self, begin: int, end: int, max_nodes: float, max_rows: int) -> list[tuple[int, int]]:
        """Cut a run where the shared prefix is shortest, into runs of at most ``max_nodes``, or one example."""
        out, stack = [], [(begin, end)]
        while stack:
            begin, end = stack.pop()
            if end - begin == 1 or (end - begin <= max_rows and self.nodes(begin, end) <= max_nodes):
                out.append((begin, end))
                continue
            shortest = min(self.shared[begin + 1 : end])
            cuts = [begin, *(i for i in range(begin + 1, end) if self.shared[i] == shortest), end]
            stack += self._merge_small(cuts, max_nodes, max_rows)
        return out

    def _merge_small(self, cuts: Sequence[int], max_nodes: float, max_rows: int) -> list[tuple[int, int]]:
        """Merge small neighbours again as far as they fit, so that their shared prefix is computed once."""
        out: list[tuple[int, int]] = []
        for begin, end in pairwise(cuts):
            if out and self.nodes(out[-1][0], end) <= max_nodes and end - out[-1][0] <= max_rows:
                out[-1] = (out[-1][0], end)
            else:
                out.append((begin, end))
        return out

    def shared_with(self, positions: Sequence[int], begin: int, end: int) -> int:
        """Count the nodes of a run that a trie of the examples at ``positions`` (ascending) has already."""
        at, longest = bisect(positions, begin), 0
        if at:
            longest = min(self.shared[positions[at - 1] + 1 : begin + 1])
        if at < len(positions):
            longest = max(longest, min(self.shared[end : positions[at] + 1]))
        return longest


@dataclass(slots=True)
class Bin:
    """A trie being filled.

    Attributes:
        k: which forward of its rank it is.
        positions: of its examples in sorted order, ascending.
        nodes: so far.
    """

    k: int
    positions: list[int] = field(default_factory=list)
    nodes: int = 0


def step_cost(costs: Sequence[int], world_size: int) -> int:
    """Return what a step takes, in nodes, when ranks meet at every forward: each lasts as long as its costliest trie.

    Args:
        costs: nodes of the tries, in any order; tries of like cost are forwarded together.
        world_size: so many are forwarded at a time.
    """
    return sum(sorted(costs, reverse=True)[::world_size])


def balance_tries(
    forest: Forest, runs: list[SizedTrie], world_size: int, per_rank: int, max_rows: int, max_nodes: int
) -> list[SizedTrie]:
    """Return ``runs``, or other tries of the same examples if they make a shorter step.

    Args:
        forest: the examples.
        runs: a way to cut them.
        world_size: number of ranks.
        per_rank: forwards of each.
        max_rows: examples a trie.
        max_nodes: nodes a trie, unless it is of one example.
    """
    shortest = forest.shortest_step(world_size)
    best, step = runs, step_cost([nodes for nodes, _ in runs], world_size)
    if len(forest.lengths) * per_rank * world_size > MAX_TRIALS:
        return runs
    for target, whole in TARGETS:
        if step <= GOOD_ENOUGH * shortest:
            break
        cap = min(max_nodes, int(target * max(shortest / per_rank, forest.sums[-1] / (per_rank * world_size))))
        bins = [b for b in _assign(forest, world_size, per_rank, (max_rows, max_nodes), cap, whole) if b.positions]
        found = step_cost([b.nodes for b in bins], world_size)
        if bins and found < step:
            best, step = [(b.nodes, b.positions) for b in bins], found
    return best


def _assign(
    forest: Forest, world_size: int, per_rank: int, limits: tuple[int, int], cap: int, whole: float
) -> list[Bin]:
    """Assign subtrees to ``per_rank`` forwards of each rank; no bins when they do not fit.

    Args:
        forest: the examples.
        world_size: number of ranks.
        per_rank: forwards of each.
        limits: examples and nodes a trie.
        cap: a subtree that would make a trie larger than this, and the step longer, is cut further.
        whole: the largest subtree that is assigned as one, as a share of ``cap``.
    """
    bins = [Bin(k) for k in range(per_rank) for _ in range(world_size)]
    lasts = [cap] * per_rank  # nodes that each forward takes anyway
    units = [(-forest.nodes(b, e), b, e) for b, e in forest.subtrees(0, len(forest.lengths), whole * cap, limits[0])]
    heapify(units)
    while units:
        alone, begin, end = heappop(units)
        excess, nodes, best = _best_bin(forest, bins, lasts, (begin, end), limits)
        if end - begin > 1 and (best is None or excess > 0):
            for b, e in forest.subtrees(begin, end, -alone // 2, (end - begin + 1) // 2):
                heappush(units, (-forest.nodes(b, e), b, e))
            continue
        if best is None:
            return []
        at = bisect(best.positions, begin)
        best.positions[at:at] = range(begin, end)
        best.nodes, lasts[best.k] = nodes, max(lasts[best.k], nodes)
    return bins


def _best_bin(
    forest: Forest, bins: list[Bin], lasts: list[int], run: tuple[int, int], limits: tuple[int, int]
) -> tuple[int, int, Bin | None]:
    """Find the bin where a run makes the step least longer, then adds fewest nodes, then makes the smallest trie.

    Returns:
        By how much the step grows, the bin's nodes then, and the bin, if the run fits anywhere.
    """
    begin, end = run
    alone = forest.nodes(begin, end)
    best, best_bin = (0, 0, 0), None
    for bin_ in bins:
        added = alone - (forest.shared_with(bin_.positions, begin, end) if bin_.positions else 0)
        nodes = bin_.nodes + added
        fits = len(bin_.positions) + end - begin <= limits[0] and nodes <= limits[1]
        if fits or not bin_.positions:
            key = (max(0, nodes - lasts[bin_.k]), added, nodes)
            if best_bin is None or key < best:
                best, best_bin = key, bin_
        if not bin_.positions:
            break  # the other empty ones, of this and later forwards, are no better
    return best[0], best[2], best_bin
