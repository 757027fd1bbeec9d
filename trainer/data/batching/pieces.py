"""Lay out a micro-batch's attention in pieces of unlike length, for one varlen call: queries, and the keys they see.

In a trie, a piece is the new nodes of an example as queries, with the example's whole path from the root as keys. The
queries are the last of their keys, so a causal mask aligned to the last key is the trie's own mask: nothing is padded,
masked or reordered. Where nothing is shared the keys are the nodes themselves, and nothing is gathered. A padded row is
a piece too: padding stands on the right, where no token sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from trainer.data.batching.trie import Trie


@dataclass(frozen=True, slots=True)
class GatheredKeys:
    """Which nodes of a trie are the keys: each once in its own piece, and once more in each that shares it. All int64.

    Attributes:
        nodes: of the keys, shape (keys,).
        own: the key in its own piece of each node, shape (nodes,).
        prefixes: the other keys, shape (keys - nodes,).
        shared: the nodes that these are of, each once.
        prefix_nodes: which of ``shared`` each of ``prefixes`` is.
    """

    nodes: Tensor
    own: Tensor
    prefixes: Tensor
    shared: Tensor
    prefix_nodes: Tensor

    def tensors(self) -> list[Tensor]:
        """Return its tensors, in order."""
        return [getattr(self, field.name) for field in fields(self)]

    def repeated(self, times: int) -> GatheredKeys:
        """Return the keys of the same trie so many times, one after another."""
        counts = len(self.own), len(self.nodes), len(self.nodes), len(self.own), len(self.shared)
        return GatheredKeys(*(_repeat(t, count, times) for t, count in zip(self.tensors(), counts, strict=True)))


@dataclass(frozen=True, slots=True)
class Pieces:
    """The queries and keys of a micro-batch's attention, piece after piece.

    Attributes:
        query_ends: where each piece's queries end among the tokens, from 0 on, int32, shape (pieces + 1,).
        key_ends: the same of its keys.
        gathered: how the keys are gathered; ``None`` where they are the tokens in their own order.
        max_queries: of one piece.
        max_keys: of one piece.
        rows: of the forward: 1 in a trie.
        tokens: of each row.
    """

    query_ends: Tensor
    key_ends: Tensor
    gathered: GatheredKeys | None
    max_queries: int
    max_keys: int
    rows: int
    tokens: int

    @property
    def copies(self) -> float:
        """The mean number of copies of a token's key and value; 0 where nothing is gathered."""
        return 0.0 if self.gathered is None else len(self.gathered.nodes) / (self.rows * self.tokens)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and tokens of the forward that it is the attention of."""
        return self.rows, self.tokens

    def repeated(self, times: int) -> Pieces:
        """Return the layout of the same rows so many times, one after another."""
        tokens = self.rows * self.tokens
        keys = tokens if self.gathered is None else len(self.gathered.nodes)
        query_ends = torch.cat([self.query_ends[:1], _repeat(self.query_ends[1:], tokens, times)])
        key_ends = torch.cat([self.key_ends[:1], _repeat(self.key_ends[1:], keys, times)])
        gathered = None if self.gathered is None else self.gathered.repeated(times)
        return Pieces(query_ends, key_ends, gathered, self.max_queries, self.max_keys, times * self.rows, self.tokens)

    def tensors(self) -> list[Tensor]:
        """Return its tensors, which :meth:`with_tensors` takes back from another device."""
        return [self.query_ends, self.key_ends, *([] if self.gathered is None else self.gathered.tensors())]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Pieces:
        """Return the same with these tensors in place of :meth:`tensors`."""
        query_ends, key_ends, *rest = tensors
        gathered = GatheredKeys(*rest) if rest else None
        return Pieces(query_ends, key_ends, gathered, self.max_queries, self.max_keys, self.rows, self.tokens)


def trie_pieces(trie: Trie) -> Pieces:
    """Cut a trie into one piece a distinct example, in depth-first order."""
    key_counts = [len(path) for path in trie.paths]
    query_counts = [count - shared for count, shared in zip(key_counts, trie.shared, strict=True)]
    gathered = _gathered(trie, key_counts) if any(trie.shared) else None
    return Pieces(
        _ends(query_counts), _ends(key_counts), gathered, max(query_counts), max(key_counts), 1, len(trie.ids)
    )


def _gathered(trie: Trie, key_counts: Sequence[int]) -> GatheredKeys:
    nodes = np.concatenate(trie.paths)
    # A path begins with what it shares with the piece before it, and ends with its own nodes.
    first = np.cumsum([0, *key_counts[:-1]])
    is_prefix = np.zeros(len(nodes), dtype=bool)
    for begin, shared in zip(first, trie.shared, strict=True):
        is_prefix[begin : begin + shared] = True
    prefixes = np.flatnonzero(is_prefix)
    shared_nodes, prefix_nodes = np.unique(nodes[prefixes], return_inverse=True)
    indices = nodes, np.flatnonzero(~is_prefix), prefixes, shared_nodes, prefix_nodes
    return GatheredKeys(*(torch.from_numpy(np.ascontiguousarray(i, dtype=np.int64)) for i in indices))


def row_pieces(rows: int, width: int) -> Pieces:
    """Cut padded rows into one piece a row, padding included."""
    ends = _ends([width] * rows)
    return Pieces(ends, ends, None, width, width, rows, width)


def _repeat(indices: Tensor, count: int, times: int) -> Tensor:
    """Repeat indices into ``count`` vectors, each time of the next ``count``."""
    begins = torch.arange(0, times * count, count, dtype=indices.dtype, device=indices.device)
    return (begins[:, None] + indices).flatten()


def _ends(counts: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.cumsum([0, *counts], dtype=np.int32))
