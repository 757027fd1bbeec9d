"""How the nodes of a trie attend: rows of new nodes, and the path from the root that each row sees."""

from __future__ import annotations

import math
from collections.abc import Iterator
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
Piece = tuple[np.ndarray, int, int]  # a path from the root, and the stretch of it that is new: from, to


@dataclass(slots=True)
class Bucket:
    """Rows of queries with keys of like length.

    Attributes:
        queries: trie nodes, int64, shape (rows, queries); short rows are filled up with node 0.
        keys: the paths from the root to each row's last query, int64, shape (rows, keys); filled up with node 0.
        depths: depth of each row's first query, int64, shape (rows,).
    """

    queries: Tensor
    keys: Tensor
    depths: Tensor
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor:
        """Which keys each query sees: bool, shape (rows, 1, queries, keys). A key's column is its depth."""
        if window not in self._masks:
            device = self.queries.device
            own = self.depths[:, None, None] + torch.arange(self.queries.shape[1], device=device)[None, :, None]
            depth = torch.arange(self.keys.shape[1], device=device)[None, None, :]
            seen = depth <= own
            if window is not None:
                seen &= own - depth < window
            # A filler beyond the last key may see nothing; SDPA would give NaN, whose gradient would spread.
            self._masks[window] = (seen | (~seen.any(-1, keepdim=True) & (depth == 0))).unsqueeze(1)
        return self._masks[window]


@dataclass(frozen=True, slots=True)
class Order:
    """Where the vectors of (heads, nodes) stand among the buckets' (rows, heads, queries), both flattened.

    Attributes:
        there: which vector stands at each place, int64, shape (places,); a filled-up place holds node 0's.
        back: the place of each vector, int64, shape (heads * nodes,).
        fillers: the filled-up places, int64.
        node_there, node_back: ``there`` and ``back`` of (nodes, heads), flattened, which the outputs are in.
    """

    there: Tensor
    back: Tensor
    fillers: Tensor
    node_there: Tensor
    node_back: Tensor


@dataclass(slots=True)
class Paths:
    """How the nodes of a trie attend.

    Attributes:
        buckets: their queries, flattened and put together, are one list.
        place: where each node stands in that list, int64, shape (nodes,).
    """

    buckets: list[Bucket]
    place: Tensor
    _orders: dict[int, Order] = field(default_factory=dict)
    _keys: dict[int, list[Tensor]] = field(default_factory=dict)

    @property
    def copies(self) -> float:
        """How often, in the mean, a node's key and value are copied for the rows that attend to it."""
        return sum(b.keys.numel() for b in self.buckets) / len(self.place)

    def order(self, heads: int) -> Order:
        """Of so many query heads."""
        if heads not in self._orders:
            nodes = len(self.place)
            pieces = [_expand_heads(b.queries, heads, nodes) for b in self.buckets]
            there = torch.cat(pieces)
            places = torch.arange(len(there), device=self.place.device)
            grids = [
                piece.view(len(b.queries), heads, -1).transpose(0, 1).flatten(1)
                for b, piece in zip(self.buckets, places.split([len(p) for p in pieces]), strict=True)
            ]
            back = torch.cat(grids, dim=1)[:, self.place]
            empty = torch.ones_like(places, dtype=torch.bool).index_fill_(0, back.flatten(), False)
            self._orders[heads] = Order(
                there,
                back.flatten(),
                empty.nonzero().flatten(),
                node_there=there % nodes * heads + there // nodes,
                node_back=back.t().flatten(),
            )
        return self._orders[heads]

    def keys(self, heads: int) -> list[Tensor]:
        """Of each bucket, of so many key heads: which vector of (heads, nodes) stands at each place of
        (rows, heads, keys), both flattened; int64."""
        if heads not in self._keys:
            self._keys[heads] = [_expand_heads(b.keys, heads, len(self.place)) for b in self.buckets]
        return self._keys[heads]

    def to(self, device: torch.device) -> Paths:
        """The same on ``device``."""
        moved = [Bucket(b.queries.to(device), b.keys.to(device), b.depths.to(device)) for b in self.buckets]
        return Paths(moved, self.place.to(device))


def _expand_heads(nodes: Tensor, heads: int, count: int) -> Tensor:
    """(rows, width) of nodes -> positions in (heads, count), laid (rows, heads, width) and flattened."""
    head = torch.arange(heads, device=nodes.device)[None, :, None]
    return (nodes[:, None, :] + head * count).flatten()


def build_paths(trie: Trie) -> Paths:
    """Cut a trie's new nodes into rows of queries, each with the path that leads to it as keys.

    Most examples add about as many nodes as the median one, and are a row each. Longer stretches (the first example,
    with the beginning that all share) are rows of their own kind, cut where they are very long. A row ending at depth d
    has d + 1 keys; rows whose keys are of like length share a bucket, so that little is filled up.
    """
    usual = max(MIN_QUERIES, round(SPREAD * np.median([len(p) - s for p, s in zip(trie.paths, trie.starts)])))
    short: list[Piece] = []
    long: list[Piece] = []
    for path, start in zip(trie.paths, trie.starts, strict=True):
        size = len(path) - start
        if size <= usual:
            short.append((path, start, len(path)))
            continue
        cuts = np.linspace(start, len(path), math.ceil(size / max(usual, MAX_QUERIES)) + 1).astype(int).tolist()
        long += [(path, begin, end) for begin, end in pairwise(cuts)]
    buckets: list[Bucket] = []
    place = np.empty(len(trie.ids), dtype=np.int64)
    laid = 0
    for group in (*_group_by_key_length(short), *_group_by_key_length(long)):
        width = max(e - b for _, b, e in group)
        queries = np.zeros((len(group), width), dtype=np.int64)
        keys = np.zeros((len(group), group[0][2]), dtype=np.int64)
        for row, (path, b, e) in enumerate(group):
            queries[row, : e - b] = path[b:e]
            keys[row, :e] = path[:e]
            place[path[b:e]] = laid + row * width + np.arange(e - b)
        laid += queries.size
        depths = torch.tensor([b for _, b, _ in group])
        buckets.append(Bucket(torch.from_numpy(queries), torch.from_numpy(keys), depths))
    return Paths(buckets, torch.from_numpy(place))


def _group_by_key_length(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Groups of pieces whose ends, and so the lengths of their keys, differ by little."""
    pieces.sort(key=lambda p: -p[2])
    at = 0
    while at < len(pieces):
        keys, end = pieces[at][2], at + 1
        while end < len(pieces) and pieces[end][2] * SPREAD >= keys and (end - at + 1) * keys <= MAX_KEYS:
            end += 1
        yield pieces[at:end]
        at = end
