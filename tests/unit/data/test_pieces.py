"""Pieces of a micro-batch: every node is a query once, and its keys are the path that leads to it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.shared_prefixes import rows_with_shared_prefixes
from trainer.data.batching.micro_batch import Tokens
from trainer.data.batching.pieces import row_pieces, trie_pieces
from trainer.data.batching.trie import build_trie


@settings(max_examples=200, deadline=None)
@given(rows_with_shared_prefixes())
def test_the_queries_of_a_trie_end_their_own_paths(rows: list[Tokens]) -> None:
    trie = build_trie([r.ids for r in rows], [r.loss_mask for r in rows])
    pieces = trie_pieces(trie)
    assert pieces.query_ends[-1] == len(trie.ids)
    key_nodes = np.arange(len(trie.ids)) if pieces.key_nodes is None else pieces.key_nodes.numpy()
    ends = zip(pairwise(pieces.query_ends.tolist()), pairwise(pieces.key_ends.tolist()), strict=True)
    lengths = []
    for (begin, end), (first, last) in ends:
        keys = key_nodes[first:last].tolist()
        assert keys[last - first - (end - begin) :] == list(range(begin, end))
        assert [trie.parents[node] for node in keys] == [-1, *keys[:-1]]
        lengths.append((end - begin, last - first))
    assert (pieces.max_queries, pieces.max_keys) == tuple(map(max, zip(*lengths, strict=True)))


@settings(max_examples=100, deadline=None)
@given(rows_with_shared_prefixes())
def test_nothing_is_gathered_where_nothing_is_shared(rows: list[Tokens]) -> None:
    unlike = [Tokens(np.append(np.int32(1000 + k), r.ids), np.append(False, r.loss_mask)) for k, r in enumerate(rows)]
    assert trie_pieces(build_trie([r.ids for r in unlike], [r.loss_mask for r in unlike])).key_nodes is None


@given(st.integers(1, 9), st.integers(1, 50))
def test_a_padded_row_is_a_piece(rows: int, width: int) -> None:
    pieces = row_pieces(rows, width)
    assert pieces.query_ends.tolist() == pieces.key_ends.tolist() == [width * k for k in range(rows + 1)]
    assert (pieces.shape, pieces.copies) == ((rows, width), 0)
