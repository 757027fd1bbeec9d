"""Lay out a trie's attention: rows of new nodes as queries, and as keys the path from the root that each row sees."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from trainer.data.batching.trie import Trie

MIN_QUERIES = 16  # shorter rows of queries do not fill the matrix units
MAX_QUERIES = 512  # longer rows would compute many scores that the causal mask then hides
SPREAD = 1.5  # rows of queries share a bucket when their key lengths differ by less than this factor
MAX_KEYS = 1 << 15  # key positions a bucket: bounds the copies of keys and values that exist at a time
Segment = tuple[np.ndarray, int, int]  # a path from the root, and which of its nodes are the queries: from, to


@dataclass(slots=True)
class Bucket:
    """Rows of queries whose keys have like lengths: one attention call.

    Attributes:
        queries: trie nodes, int64, shape (rows, queries); short rows are padded with node 0.
        keys: the paths from the root to each row's last query, int64, shape (rows, keys); padded with node 0.
        depths: depth of each row's first query, int64, shape (rows,).
    """

    queries: Tensor
    keys: Tensor
    depths: Tensor
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor:
        """Return which keys each query sees: bool, shape (rows, 1, queries, keys). A key's column is its depth.

        Args:
            window: of a layer with sliding-window attention, in tokens; ``None`` sees the whole path.
        """
        if window not in self._masks:
            device = self.queries.device
            own = self.depths[:, None, None] + torch.arange(self.queries.shape[1], device=device)[None, :, None]
            depth = torch.arange(self.keys.shape[1], device=device)[None, None, :]
            seen = depth <= own
            if window is not None:
                seen &= own - depth < window
            # A padded query beyond the last key may see nothing; SDPA would give NaN, whose gradient would spread.
            self._masks[window] = (seen | (~seen.any(-1, keepdim=True) & (depth == 0))).unsqueeze(1)
        return self._masks[window]


@dataclass(frozen=True, slots=True)
class QueryOrder:
    """Indices that reorder query vectors from (heads, nodes) to the buckets' (rows, heads, queries), both flattened.

    Attributes:
        gather: which vector stands at each place of the buckets, int64, shape (places,); node 0's in padding.
        inverse: the place of each vector, int64, shape (heads * nodes,).
        padding: the padded places, int64, in no order.
        node_gather, node_inverse: ``gather`` and ``inverse`` of (trials, nodes, own heads), flattened: the layout of
            the outputs.
    """

    gather: Tensor
    inverse: Tensor
    padding: Tensor
    node_gather: Tensor
    node_inverse: Tensor


@dataclass(slots=True)
class TriePaths:
    """The queries and keys of a trie's attention.

    Attributes:
        buckets: their queries, flattened and concatenated, are one list of nodes and padding.
        place: where each node stands in that list, int64, shape (nodes,).
        padding: of each padding in it, where its row begins, how wide the row is, and its column, int64, shape
            (3, paddings).
    """

    buckets: list[Bucket]
    place: Tensor
    padding: Tensor
    _query_orders: dict[tuple[int, int], QueryOrder] = field(default_factory=dict)
    _key_indices: dict[int, list[Tensor]] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and tokens of the forward that it is the attention of: one row of all nodes."""
        return 1, len(self.place)

    @property
    def copies(self) -> float:
        """The mean number of copies of a node's key and value: one for each row that attends to it."""
        return sum(b.keys.numel() for b in self.buckets) / len(self.place)

    def query_order(self, heads: int, trials: int = 1) -> QueryOrder:
        """Return how ``heads`` query heads, of ``trials`` after one another, are reordered; computed once."""
        if (heads, trials) not in self._query_orders:
            nodes = len(self.place)
            parts = [_expand_heads(b.queries, heads, nodes) for b in self.buckets]
            gather = torch.cat(parts)
            places = torch.arange(len(gather), device=self.place.device)
            row_begin, width, column = self.padding[:, :, None]
            head = torch.arange(heads, device=self.place.device)
            grids = [
                part.view(len(b.queries), heads, -1).transpose(0, 1).flatten(1)
                for b, part in zip(self.buckets, places.split([len(p) for p in parts]), strict=True)
            ]
            inverse = torch.cat(grids, dim=1)[:, self.place]
            own = heads // trials
            self._query_orders[heads, trials] = QueryOrder(
                gather,
                inverse.flatten(),
                # by arithmetic, not by looking for them: how many there are, the host would have to wait for
                (row_begin * heads + head * width + column).flatten(),
                node_gather=(gather // (own * nodes) * nodes + gather % nodes) * own + gather // nodes % own,
                node_inverse=inverse.view(trials, own, nodes).transpose(1, 2).flatten(),
            )
        return self._query_orders[heads, trials]

    def key_indices(self, heads: int) -> list[Tensor]:
        """Return, for each bucket, which vector of (heads, nodes) each of its (rows, heads, keys) is, both flattened:
        int64; computed once."""
        if heads not in self._key_indices:
            self._key_indices[heads] = [_expand_heads(b.keys, heads, len(self.place)) for b in self.buckets]
        return self._key_indices[heads]

    def tensors(self) -> list[Tensor]:
        """Return all tensors, in the order that :meth:`with_tensors` takes them."""
        return [self.place, self.padding, *(t for b in self.buckets for t in (b.queries, b.keys, b.depths))]

    def with_tensors(self, tensors: Sequence[Tensor]) -> TriePaths:
        """Return the same with other tensors in the places of its own."""
        place, padding, *others = tensors
        return TriePaths([Bucket(*others[k : k + 3]) for k in range(0, len(others), 3)], place, padding)


def _expand_heads(nodes: Tensor, heads: int, count: int) -> Tensor:
    """Turn nodes (rows, width) into indices of (heads, count) vectors, ordered (rows, heads, width) and flattened."""
    head = torch.arange(heads, device=nodes.device)[None, :, None]
    return (nodes[:, None, :] + head * count).flatten()


def build_paths(trie: Trie) -> TriePaths:
    """Cut a trie's new nodes into rows of queries, each with the path that leads to it as keys.

    Most examples add about as many nodes as the median one, and are a row each. Longer segments (the first example,
    with the prefix that all share) are rows of their own kind, cut where they are very long. A row ending at depth d
    has d + 1 keys; rows whose keys are of like length share a bucket, so that there is little padding.
    """
    usual = max(MIN_QUERIES, round(SPREAD * np.median([len(p) - s for p, s in zip(trie.paths, trie.shared)])))
    short: list[Segment] = []
    long: list[Segment] = []
    for path, start in zip(trie.paths, trie.shared, strict=True):
        size = len(path) - start
        if size <= usual:
            short.append((path, start, len(path)))
            continue
        cuts = np.linspace(start, len(path), math.ceil(size / max(usual, MAX_QUERIES)) + 1).astype(int).tolist()
        long += [(path, begin, end) for begin, end in pairwise(cuts)]
    buckets: list[Bucket] = []
    place = np.empty(len(trie.ids), dtype=np.int64)
    padding: list[np.ndarray] = []
    laid = 0
    for group in (*_group_by_key_length(short), *_group_by_key_length(long)):
        width = max(e - b for _, b, e in group)
        queries = np.zeros((len(group), width), dtype=np.int64)
        keys = np.zeros((len(group), group[0][2]), dtype=np.int64)
        for row, (path, b, e) in enumerate(group):
            queries[row, : e - b] = path[b:e]
            keys[row, :e] = path[:e]
            place[path[b:e]] = laid + row * width + np.arange(e - b)
        rows, columns = np.nonzero(np.arange(width) >= np.asarray([[e - b] for _, b, e in group]))
        padding.append(np.stack([laid + rows * width, np.full_like(rows, width), columns]))
        laid += queries.size
        depths = torch.tensor([b for _, b, _ in group])
        buckets.append(Bucket(torch.from_numpy(queries), torch.from_numpy(keys), depths))
    return TriePaths(buckets, torch.from_numpy(place), torch.from_numpy(np.concatenate(padding, axis=1)))


def _group_by_key_length(segments: list[Segment]) -> Iterator[list[Segment]]:
    """Group segments whose ends, and so the lengths of their keys, differ by little."""
    segments.sort(key=lambda s: -s[2])
    at = 0
    while at < len(segments):
        keys, end = segments[at][2], at + 1
        while end < len(segments) and segments[end][2] * SPREAD >= keys and (end - at + 1) * keys <= MAX_KEYS:
            end += 1
        yield segments[at:end]
        at = end
