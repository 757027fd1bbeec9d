"""The places of a trie's padding in its attention, against a search for the places where no node stands."""

from __future__ import annotations

from unittest.mock import patch

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.shared_prefixes import rows_with_shared_prefixes
from trainer.data.batching import trie_paths
from trainer.data.batching.micro_batch import Tokens
from trainer.data.batching.trie import build_trie


@settings(max_examples=150, deadline=None)
@given(rows_with_shared_prefixes(), st.integers(1, 5), st.integers(1, 40), st.integers(1, 60))
def test_padding_is_where_no_node_stands(rows: list[Tokens], heads: int, most_queries: int, most_keys: int) -> None:
    with (
        patch.object(trie_paths, "MIN_QUERIES", 1),
        patch.object(trie_paths, "MAX_QUERIES", most_queries),
        patch.object(trie_paths, "MAX_KEYS", most_keys),
    ):
        paths = trie_paths.build_paths(build_trie([r.ids for r in rows], [r.loss_mask for r in rows]))
    order = paths.query_order(heads)
    is_empty = torch.ones(len(order.gather), dtype=torch.bool)
    is_empty[order.inverse] = False
    assert torch.equal(order.padding.sort().values, is_empty.nonzero().flatten())
    assert torch.equal(order.gather[order.inverse], torch.arange(heads * len(paths.place)))
