"""The token trie: its nodes are the distinct prefixes, and rows are split by what they share."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.shared_prefixes import rows_with_shared_prefixes
from trainer.data.batching import trie_paths
from trainer.data.batching.micro_batch import Tokens
from trainer.data.batching.packing import Packing
from trainer.data.batching.rank_split import Limits
from trainer.data.batching.trie import build_trie
from trainer.kernels import trie_attention as attention


@settings(max_examples=300, deadline=None)
@given(rows_with_shared_prefixes())
def test_nodes_are_the_distinct_prefixes(rows: list[Tokens]) -> None:
    trie = build_trie([r.ids for r in rows], [r.loss_mask for r in rows])
    words = [tuple(r.ids.tolist()) for r in rows]
    assert len(trie.ids) == len({w[:k] for w in words for k in range(1, len(w) + 1)})
    for node in range(len(trie.ids)):
        above, at = [], node
        while at >= 0:
            above.append(at)
            at = int(trie.parents[at])
        prefix = tuple(int(trie.ids[a]) for a in reversed(above))
        depth = len(prefix) - 1
        assert trie.depths[node] == depth
        path = next(p for p, start in zip(trie.paths, trie.shared, strict=True) if node in p[start:])
        assert above[::-1] == path[: depth + 1].tolist()
        labels = sum(bool(r.loss_mask[depth]) for r, w in zip(rows, words, strict=True) if w[: depth + 1] == prefix)
        assert trie.weights[node] == (labels if depth else 0)


@settings(max_examples=200, deadline=None)
@given(rows_with_shared_prefixes(), st.integers(1, 8), st.integers(3, 60), st.one_of(st.none(), st.integers(1, 4)))
def test_split_lays_every_example_once_within_the_limits(
    rows: list[Tokens], world_size: int, tokens: int, max_rows: int | None
) -> None:
    layout = Packing(True, Limits(max_rows, tokens), 0).split(rows, world_size)
    assert sorted(i for rank in layout.micros for micro in rank for i in micro) == list(range(len(rows)))
    assert len({len(rank) for rank in layout.micros}) == 1
    computed = 0
    for laid in (m for rank in layout.micros for m in rank if m):
        nodes = len(build_trie([rows[i].ids for i in laid], [rows[i].loss_mask for i in laid]).ids)
        computed += nodes
        assert len(laid) <= (max_rows or len(rows))
        assert max_rows is not None or nodes <= tokens or len(laid) == 1
    assert computed == layout.computed_tokens


def test_copies_of_a_long_document_are_bounded() -> None:
    """Fifty questions about one document: it is cut into few rows of queries, and no bucket holds many keys."""
    document = np.arange(3000, dtype=np.int32)
    rows = [np.concatenate([document, np.full(20, 5000 + k, np.int32)]) for k in range(50)]
    paths = trie_paths.build_paths(build_trie(rows, [np.ones(len(r), dtype=bool) for r in rows]))
    assert len(paths.place) == 3000 + 50 * 20
    assert max(b.keys.numel() for b in paths.buckets) <= trie_paths.MAX_KEYS
    gathered = sum(b.keys.numel() for b in paths.buckets)
    assert gathered <= 50 * 3020 + 6 * 3020
    assert paths.copies > attention.MAX_COPIES
