"""Token tensors of one device forward: rows side by side, or a trie."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from trainer.data.batching.trie import Trie, build

LEAST_QUERIES = 16  # shorter rows of queries do not fill the matrix units
MOST_QUERIES = 512  # longer rows would compute many scores that the causal mask then hides
SPREAD = 1.5  # rows of queries share a bucket when their key lengths differ by less than this factor
MOST_KEYS = 1 << 15  # key positions a bucket: bounds the copies of keys and values that exist at a time
Piece = tuple[np.ndarray, int, int]  # a path from the root, and the stretch of it that is new: from, to


@dataclass(frozen=True, slots=True)
class Tokens:
    """One example: token ids (int32) and which of them are learnt (bool), of one length."""

    ids: np.ndarray
    labels: np.ndarray


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
            pieces = [_of_heads(b.queries, heads, nodes) for b in self.buckets]
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
            self._keys[heads] = [_of_heads(b.keys, heads, len(self.place)) for b in self.buckets]
        return self._keys[heads]

    def to(self, device: torch.device) -> Paths:
        """The same on ``device``."""
        moved = [Bucket(b.queries.to(device), b.keys.to(device), b.depths.to(device)) for b in self.buckets]
        return Paths(moved, self.place.to(device))


def _of_heads(nodes: Tensor, heads: int, count: int) -> Tensor:
    """(rows, width) of nodes -> positions in (heads, count), laid (rows, heads, width) and flattened."""
    head = torch.arange(heads, device=nodes.device)[None, :, None]
    return (nodes[:, None, :] + head * count).flatten()


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward.

    Attributes:
        input_ids: int64, shape (rows, width); a trie is one row.
        attention_mask: int64, shape (rows, width), 1 on tokens and 0 on padding, which is on the right.
        source: int64, shape (labels,): the flattened position whose hidden state predicts each label.
        target: int64, shape (labels,): the label's token id.
        weight: float32, shape (labels,): how often the label counts in the loss.
        useful_tokens: the examples' own tokens.
        rows: indices of the examples in the training or held-out rows, for messages.
        most_labels: at least as many as the labels, and alike on all ranks: how often the output layer is called.
        position_ids: of a trie, int64, shape (1, width): depths; ``None`` in padded rows.
        paths: of a trie; ``None`` in padded rows.
    """

    input_ids: Tensor
    attention_mask: Tensor
    source: Tensor
    target: Tensor
    weight: Tensor
    useful_tokens: int
    rows: tuple[int, ...]
    most_labels: int
    position_ids: Tensor | None = None
    paths: Paths | None = None

    @property
    def computed_tokens(self) -> int:
        """Tokens the device runs, padding included; an empty micro-batch's stand-in counts too."""
        return self.input_ids.numel()

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with its tensors on ``device``."""
        return MicroBatch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.source.to(device),
            self.target.to(device),
            self.weight.to(device),
            self.useful_tokens,
            self.rows,
            self.most_labels,
            None if self.position_ids is None else self.position_ids.to(device),
            None if self.paths is None else self.paths.to(device),
        )


def padded(
    examples: Sequence[Tokens], rows: Sequence[int] | np.ndarray, pad_id: int, most_labels: int = 0
) -> MicroBatch:
    """Lay examples side by side, padded on the right to the longest.

    Without examples, a stand-in of one token and no label is returned: the forward runs the same collectives as on the
    other ranks and adds exactly zero.

    Args:
        examples: a label on the first token of one has nothing to be predicted from and is left out.
        rows: their indices.
        pad_id: fills the padding; masked, so any id gives the same result.
        most_labels: labels of the micro-batch that has most, of those that run at the same time on the ranks.
    """
    width = max((len(e.ids) for e in examples), default=1)
    ids = np.full((max(1, len(examples)), width), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    learnt = np.zeros(ids.shape, dtype=bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = example.ids
        mask[row, : len(example.ids)] = 1
        learnt[row, 1 : len(example.ids)] = example.labels[1:]
    if not examples:
        mask[:] = 1
    target = np.flatnonzero(learnt)
    return MicroBatch(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        source=torch.from_numpy(target - 1),
        target=torch.from_numpy(ids.reshape(-1)[target]),
        weight=torch.ones(len(target), dtype=torch.float32),
        useful_tokens=sum(len(e.ids) for e in examples),
        rows=tuple(int(r) for r in rows),
        most_labels=max(most_labels, len(target)),
    )


def shared(examples: Sequence[Tokens], rows: Sequence[int] | np.ndarray, most_labels: int = 0) -> MicroBatch:
    """Lay examples in one trie: each shared beginning once, with the loss and gradient of the separate rows.

    Args:
        examples: at least one, each of at least one token.
        rows: their indices.
        most_labels: as in :func:`padded`.
    """
    trie = build([e.ids for e in examples], [e.labels for e in examples])
    target = np.flatnonzero(trie.weights)
    return MicroBatch(
        input_ids=torch.from_numpy(trie.ids)[None],
        attention_mask=torch.ones(1, len(trie.ids), dtype=torch.int64),
        source=torch.from_numpy(trie.parents[target]),
        target=torch.from_numpy(trie.ids[target]),
        weight=torch.from_numpy(trie.weights[target].astype(np.float32)),
        useful_tokens=sum(len(e.ids) for e in examples),
        rows=tuple(int(r) for r in rows),
        most_labels=max(most_labels, len(target)),
        position_ids=torch.from_numpy(trie.depths)[None],
        paths=paths_of(trie),
    )


def paths_of(trie: Trie) -> Paths:
    """Cut a trie's new nodes into rows of queries, each with the path that leads to it as keys.

    Most examples add about as many nodes as the median one, and are a row each. Longer stretches (the first example,
    with the beginning that all share) are rows of their own kind, cut where they are very long. A row ending at depth d
    has d + 1 keys; rows whose keys are of like length share a bucket, so that little is filled up.
    """
    usual = max(LEAST_QUERIES, round(SPREAD * np.median([len(p) - s for p, s in zip(trie.paths, trie.starts)])))
    short: list[Piece] = []
    long: list[Piece] = []
    for path, start in zip(trie.paths, trie.starts, strict=True):
        size = len(path) - start
        if size <= usual:
            short.append((path, start, len(path)))
            continue
        cuts = np.linspace(start, len(path), math.ceil(size / max(usual, MOST_QUERIES)) + 1).astype(int).tolist()
        long += [(path, begin, end) for begin, end in pairwise(cuts)]
    buckets: list[Bucket] = []
    place = np.empty(len(trie.ids), dtype=np.int64)
    laid = 0
    for group in (*_of_like_keys(short), *_of_like_keys(long)):
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


def _of_like_keys(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Groups of pieces whose ends, and so the lengths of their keys, differ by little."""
    pieces.sort(key=lambda p: -p[2])
    at = 0
    while at < len(pieces):
        keys, end = pieces[at][2], at + 1
        while end < len(pieces) and pieces[end][2] * SPREAD >= keys and (end - at + 1) * keys <= MOST_KEYS:
            end += 1
        yield pieces[at:end]
        at = end
