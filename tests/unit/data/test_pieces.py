"""Pieces of a micro-batch: every node is a query once, and its keys are the path that leads to it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.helpers.shared_prefixes import rows_with_shared_prefixes
from trainer.data.batching.micro_batch import Tokens
from trainer.data.batching.pieces import row_pieces, trie_pieces
from trainer.data.batching.trie import build_trie
from trainer.kernels.gather import GatherKeys


@settings(max_examples=200, deadline=None)
@given(rows_with_shared_prefixes())
def test_the_queries_of_a_trie_end_their_own_paths(rows: list[Tokens]) -> None:
    trie = build_trie([r.ids for r in rows], [r.loss_mask for r in rows])
    pieces = trie_pieces(trie)
    assert pieces.query_ends[-1] == len(trie.ids)
    key_nodes = np.arange(len(trie.ids)) if pieces.gathered is None else pieces.gathered.nodes.numpy()
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
    assert trie_pieces(build_trie([r.ids for r in unlike], [r.loss_mask for r in unlike])).gathered is None


@settings(max_examples=100, deadline=None)
@given(rows_with_shared_prefixes(), st.integers(0, 1000))
def test_gathered_keys_have_the_gradient_of_plain_indexing(rows: list[Tokens], seed: int) -> None:
    trie = build_trie([r.ids for r in rows], [r.loss_mask for r in rows])
    gathered = trie_pieces(trie).gathered
    assume(gathered is not None)
    generator = torch.Generator().manual_seed(seed)
    nodes = torch.randn(len(trie.ids), 3, generator=generator, dtype=torch.float64, requires_grad=True)
    outer = torch.randn(len(gathered.nodes), 3, generator=generator, dtype=torch.float64)
    keys = GatherKeys.apply(nodes, *gathered.tensors())
    assert torch.equal(keys, nodes[gathered.nodes])
    found, expected = (torch.autograd.grad(k, nodes, outer)[0] for k in (keys, nodes[gathered.nodes]))
    torch.testing.assert_close(found, expected)


@given(st.integers(1, 9), st.integers(1, 50))
def test_a_padded_row_is_a_piece(rows: int, width: int) -> None:
    pieces = row_pieces(rows, width)
    assert pieces.query_ends.tolist() == pieces.key_ends.tolist() == [width * k for k in range(rows + 1)]
    assert (pieces.shape, pieces.copies) == ((rows, width), 0)
