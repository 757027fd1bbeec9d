"""The token trie of a micro-batch: examples that begin alike share their beginning, and it is computed once.

Examples are sorted by their token ids and laid one after the other; each adds only the tokens that its predecessor
does not already have (a depth-first walk of the trie). A token is followed by different continuations in different
examples, so it is predicted from its *parent's* hidden state, and it counts in the loss as often as it is a label in
the examples that run through it. Loss and gradient are those of the separate rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Trie:
    """A micro-batch as one sequence of T trie nodes in depth-first order.

    Attributes:
        ids: token ids, int64 (T,).
        depths: place of each token in its examples, from 0: its position id, int64 (T,).
        parents: node before it in its examples, -1 at a root, int64 (T,).
        weights: in how many examples the node is a label that has a parent, int64 (T,).
        paths: for each distinct example in laid order, its nodes from the root on.
        starts: for each of ``paths``, how many of its nodes stood already before it was laid.
    """

    ids: np.ndarray
    depths: np.ndarray
    parents: np.ndarray
    weights: np.ndarray
    paths: list[np.ndarray]
    starts: list[int]


def sort_by_tokens(examples: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The order that lays examples with equal beginnings side by side.

    Args:
        examples: token ids, int32, one array an example.

    Returns:
        ``order``: indices of the examples, sorted by their ids; ``shared``: for each in that order, how many tokens at
        its beginning its predecessor has too (0 for the first). Both int64, shape (examples,).
    """
    keys = [np.ascontiguousarray(e, dtype=">u4").tobytes() for e in examples]
    order = sorted(range(len(examples)), key=keys.__getitem__)
    shared = np.zeros(len(order), dtype=np.int64)
    for i in range(1, len(order)):
        shared[i] = common_prefix(examples[order[i - 1]], examples[order[i]])
    return np.asarray(order, dtype=np.int64), shared


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common beginning of two arrays."""
    n = min(len(a), len(b))
    unequal = np.flatnonzero(a[:n] != b[:n])
    return int(unequal[0]) if len(unequal) else n


def build(examples: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> Trie:
    """The trie of some examples.

    Args:
        examples: token ids of each, at least one token.
        labels: for each, which of its tokens are learnt, bool, of the same length.
    """
    order, shared = sort_by_tokens(examples)
    total = int(sum(len(examples[e]) for e in order) - shared.sum())
    ids, depths = np.empty(total, np.int64), np.empty(total, np.int64)
    parents, weights = np.empty(total, np.int64), np.zeros(total, np.int64)
    paths: list[np.ndarray] = []
    starts: list[int] = []
    path, laid = np.empty(0, np.int64), 0
    for example, start in zip(order, shared, strict=True):
        tokens = examples[example]
        new = np.arange(laid, laid + len(tokens) - start)
        path = np.concatenate([path[:start], new])
        ids[new], depths[new] = tokens[start:], np.arange(start, len(tokens))
        parents[new] = np.concatenate([path[start - 1 : start] if start else [-1], new])[: len(new)]
        learnt = np.asarray(labels[example], dtype=bool).copy()
        learnt[0] = False  # nothing stands before it that could predict it
        weights[path[learnt]] += 1
        if len(new):
            paths.append(path)
            starts.append(int(start))
        laid += len(new)
    return Trie(ids, depths, parents, weights, paths, starts)
