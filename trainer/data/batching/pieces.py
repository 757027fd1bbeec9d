"""Lay out a micro-batch's attention in pieces of unlike length, for one varlen call: queries, and the keys they see.

In a trie, a piece is the new nodes of an example as queries, with the example's whole path from the root as keys. The
queries are the last of their keys, so a causal mask aligned to the last key is the trie's own mask: nothing is padded,
masked or reordered. Where nothing is shared the keys are the nodes themselves, and nothing is gathered. A padded row is
a piece too: padding stands on the right, where no token sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.data.batching.trie import Trie


@dataclass(frozen=True, slots=True)
class Pieces:
    """The queries and keys of a micro-batch's attention, piece after piece.

    Attributes:
        query_ends: where each piece's queries end among the tokens, from 0 on, int32, shape (pieces + 1,).
        key_ends: the same of its keys.
        key_nodes: the token of each key, int64, shape (keys,); ``None`` where keys are the tokens in their own order.
        max_queries: of one piece.
        max_keys: of one piece.
        rows: of the forward: 1 in a trie.
        tokens: of each row.
    """

    query_ends: Tensor
    key_ends: Tensor
    key_nodes: Tensor | None
    max_queries: int
    max_keys: int
    rows: int
    tokens: int

    @property
    def copies(self) -> float:
        """The mean number of copies of a token's key and value; 0 where nothing is gathered."""
        return 0.0 if self.key_nodes is None else len(self.key_nodes) / (self.rows * self.tokens)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and tokens of the forward that it is the attention of."""
        return self.rows, self.tokens

    def tensors(self) -> list[Tensor]:
        """Return its tensors, which :meth:`with_tensors` takes back from another device."""
        return [self.query_ends, self.key_ends, *([] if self.key_nodes is None else [self.key_nodes])]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Pieces:
        """Return the same with these tensors in place of :meth:`tensors`."""
        query_ends, key_ends, *rest = tensors
        key_nodes = rest[0] if rest else None
        return Pieces(query_ends, key_ends, key_nodes, self.max_queries, self.max_keys, self.rows, self.tokens)


def trie_pieces(trie: Trie) -> Pieces:
    """Cut a trie into one piece a distinct example, in depth-first order."""
    key_counts = [len(path) for path in trie.paths]
    query_counts = [count - shared for count, shared in zip(key_counts, trie.shared, strict=True)]
    is_gathered = sum(key_counts) != len(trie.ids)
    key_nodes = torch.from_numpy(np.concatenate(trie.paths)) if is_gathered else None
    return Pieces(
        _ends(query_counts), _ends(key_counts), key_nodes, max(query_counts), max(key_counts), 1, len(trie.ids)
    )


def row_pieces(rows: int, width: int) -> Pieces:
    """Cut padded rows into one piece a row, padding included."""
    ends = _ends([width] * rows)
    return Pieces(ends, ends, None, width, width, rows, width)


def _ends(counts: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.cumsum([0, *counts], dtype=np.int32))
