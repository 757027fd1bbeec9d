"""Build the token trie of a micro-batch: a prefix that several examples share is computed once.

Examples are sorted by their token ids and laid one after the other; each adds only the tokens after the prefix that it
shares with its predecessor (a depth-first walk of the trie). Different examples may continue after a token in different
ways, so a token is predicted from its *parent's* hidden state, and it counts in the loss as often as it is a label in
the examples that run through it. Loss and gradient are those of the separate rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True, slots=True)
class Trie:
    """A micro-batch as one sequence of T trie nodes in depth-first order.

    Attributes:
        ids: token ids, int64 (T,).
        depths: place of each token in its examples, from 0: its position id, int64 (T,).
        parents: node before it in its examples, -1 at a root, int64 (T,).
        weights: in how many examples the node is a label that has a parent, int64 (T,).
        paths: for each distinct example in depth-first order, its nodes from the root on.
        shared: for each of ``paths``, the length of the prefix that earlier paths have too; the nodes after it are new.
        inverse_lengths: mean of 1 / tokens over the examples that run through each node, float64 (T,), or ``None``.
    """

    ids: np.ndarray
    depths: np.ndarray
    parents: np.ndarray
    weights: np.ndarray
    paths: list[np.ndarray]
    shared: list[int]
    inverse_lengths: np.ndarray | None = None


def sort_by_tokens(examples: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Sort examples by their token ids, which puts those with a shared prefix side by side.

    Args:
        examples: token ids, int32, one array an example.

    Returns:
        ``order``: indices of the examples, sorted by their ids; ``shared``: for each in that order, the length of the
        prefix that it shares with its predecessor (0 for the first). Both int64, shape (examples,).
    """
    flat, starts, lengths = _concatenate(examples)
    # big-endian: bytes compare as the numbers do
    raw, at = flat.astype(">u4").tobytes(), (4 * np.append(starts, len(flat))).tolist()
    sort_keys = [raw[begin:end] for begin, end in pairwise(at)]
    order = np.asarray(sorted(range(len(examples)), key=sort_keys.__getitem__), dtype=np.int64)
    shared = np.zeros(len(order), dtype=np.int64)
    if len(order) > 1:
        shared[1:] = _shared_prefix_lengths([examples[i] for i in order], lengths[order])
    return order, shared


def _concatenate(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return arrays one after the other, where each starts, and their lengths."""
    lengths = np.fromiter(map(len, arrays), np.int64, len(arrays))
    flat = np.concatenate(arrays) if len(arrays) else np.empty(0, np.int32)
    return flat, np.cumsum(lengths) - lengths, lengths


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Concatenate the ranges ``starts[i], starts[i] + 1, …`` of ``counts[i]`` numbers."""
    return np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())


def _shared_prefix_lengths(examples: Sequence[np.ndarray], lengths: np.ndarray) -> np.ndarray:
    """Measure the longest common prefix of each two neighbours: int64, shape (examples - 1,).

    All pairs in one pass: with short examples, a comparison a pair would cost more than a fast device leaves time for.
    """
    both = np.minimum(lengths[1:], lengths[:-1])
    first, second = (
        np.concatenate([e[:n] for e, n in zip(side, both.tolist(), strict=True)])
        for side in (examples[:-1], examples[1:])
    )
    unequal = np.flatnonzero(first != second)
    begins = np.cumsum(both) - both
    # the first unequal place at or behind each pair's begin, if it is that pair's own
    found = np.append(unequal, len(first))[np.searchsorted(unequal, begins)]
    return np.minimum(found - begins, both)


def build_trie(examples: Sequence[np.ndarray], loss_masks: Sequence[np.ndarray], with_lengths: bool = False) -> Trie:
    """Build the trie of some examples.

    Args:
        examples: token ids of each, at least one token.
        loss_masks: for each, which of its tokens are in the loss, bool, of the same length.
        with_lengths: ``inverse_lengths`` are wanted.
    """
    order, shared = sort_by_tokens(examples)
    flat, begins, lengths = _concatenate([examples[i] for i in order])
    loss_mask, _, _ = _concatenate([np.asarray(loss_masks[i], dtype=bool) for i in order])
    loss_mask[begins] = False  # nothing stands before it that could predict it
    new = lengths - shared
    ends = np.cumsum(new)
    total = int(ends[-1])
    nodes = np.arange(total)
    parents = nodes - 1
    paths: list[np.ndarray] = []
    path = nodes[:0]
    for start, first, end in zip(shared.tolist(), (ends - new).tolist(), ends.tolist(), strict=True):
        if first < end:
            parents[first] = path[start - 1] if start else -1
        path = np.concatenate((path[:start], nodes[first:end]))
        paths.append(path)
    distinct, visited = np.flatnonzero(new), np.concatenate(paths)
    inverse_lengths = None
    if with_lengths:
        inverse_lengths = np.bincount(visited, np.repeat(1 / lengths, lengths)) / np.bincount(visited)
    return Trie(
        ids=flat[_ranges(begins + shared, new)].astype(np.int64),
        depths=_ranges(shared, new),
        parents=parents,
        weights=np.bincount(visited[loss_mask], minlength=total),
        paths=[paths[i] for i in distinct],
        shared=shared[distinct].tolist(),
        inverse_lengths=inverse_lengths,
    )
