"""The token trie and its attention: the loss and every gradient of the separate rows, whatever the rows are."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.architectures import KINDS_OF_ATTENTION, tiny
from trainer.data.batching import trie_paths
from trainer.data.batching.micro_batch import Tokens
from trainer.data.batching.packing import Packing
from trainer.data.batching.rank_split import Limits
from trainer.data.batching.trie import build_trie
from trainer.engine.verify_trie import trie_obstacle
from trainer.kernels import trie_attention as attention
from trainer.kernels.label_loss import LabelLoss
from trainer.kernels.trie_attention import KERNEL, register, trie_context

# Few token ids, so that prefixes are shared by chance; sometimes a long common one.
ids = st.lists(st.integers(0, 2), min_size=1, max_size=9)
row_ids = st.one_of(ids, st.builds(lambda n, tail: [3] * n + tail, st.integers(0, 12), ids))


deep = st.integers(20, 60).map(lambda n: [[3, 4] * (n // 2), [3, 4] * (n // 2) + [2], [3] * n])
wide = st.integers(9, 30).map(lambda n: [[3, 4, k, k] for k in range(5, 5 + n)])
chain = st.integers(2, 12).map(lambda n: [[4] * k for k in range(1, n + 1)])
turns = st.builds(lambda a, b, c: [a + b, a + b + c, a + c], ids, ids, ids)
rows_of_a_kind = st.one_of(
    st.lists(row_ids, min_size=1, max_size=8),
    row_ids.map(lambda r: [r]),
    row_ids.map(lambda r: [r] * 5),
    *(deep, wide, chain, turns),
)


@st.composite
def loss_masks(draw: st.DrawFn, length: int) -> list[bool]:
    """None, all, an answer at the end, several turns, or any."""
    kind = draw(st.sampled_from(["none", "all", "answer", "turns", "any"]))
    begin, period = draw(st.integers(0, length)), draw(st.integers(1, 5))
    if kind == "any":
        return draw(st.lists(st.booleans(), min_size=length, max_size=length))
    is_in_loss = {
        "none": lambda i: False,
        "all": lambda i: True,
        "answer": lambda i: i >= begin,
        "turns": lambda i: i // period % 2 == 1,
    }
    return [is_in_loss[kind](i) for i in range(length)]


@st.composite
def examples(draw: st.DrawFn) -> list[Tokens]:
    rows = list(draw(rows_of_a_kind))
    rows += [rows[0]] * draw(st.integers(0, 1))  # an equal one
    if draw(st.booleans()):
        rows += [rows[0][: draw(st.integers(1, len(rows[0])))]]  # a prefix of another
    drawn = [draw(loss_masks(len(r))) for r in rows]
    return [Tokens(np.asarray(r, np.int32), np.asarray(lab, bool)) for r, lab in zip(rows, drawn, strict=True)]


@settings(max_examples=300, deadline=None)
@given(examples())
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
@given(examples(), st.integers(1, 8), st.integers(3, 60), st.one_of(st.none(), st.integers(1, 4)))
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


# `make check` tries a plain model and one with a window.
QUICK = ("llama", "mistral, window 8")
CASES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in KINDS_OF_ATTENTION]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Any, LabelLoss]:
    torch.manual_seed(0)
    # double: what is left of a difference is the fp32 of the loss, not the order of sums in the model
    model = tiny(request.param).double()
    register()
    model.set_attn_implementation(KERNEL)
    assert trie_obstacle(model) is None
    return model, LabelLoss(model)


def loss_and_gradients(case: tuple[Any, LabelLoss], packing: Packing, rows: list[Tokens]) -> tuple[float, list[Tensor]]:
    model, loss = case
    model.zero_grad(set_to_none=False)
    total = 0.0
    for laid in packing.split(rows, 1).micros[0]:
        batch = packing.collate([rows[i] for i in laid], laid)
        with trie_context(batch.paths):
            value = loss(model, batch)
            value.backward()
        total += value.item()
    return total, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def stock_loss(model: Any, rows: list[Tokens]) -> float:
    """Row by row through transformers' own forward and its own causal mask."""
    total = 0.0
    for row in rows:
        logits = model(torch.from_numpy(row.ids.astype(np.int64))[None], use_cache=False).logits[0]
        sources = torch.from_numpy(np.flatnonzero(row.loss_mask[1:]))
        targets = torch.from_numpy(row.ids[1:].astype(np.int64))
        total += torch.nn.functional.cross_entropy(logits[sources], targets[sources], reduction="sum").item()
    return total


@settings(max_examples=25, deadline=None)
@given(rows=examples(), limits=st.sampled_from([Limits(None, 4096), Limits(None, 20), Limits(2, 0)]))
def test_trie_equals_padded(case: tuple[Any, LabelLoss], rows: list[Tokens], limits: Limits) -> None:
    expected, gradients = loss_and_gradients(case, Packing(False, Limits(None, 4096), 0), rows)
    found, others = loss_and_gradients(case, Packing(True, limits, 0), rows)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert found == pytest.approx(stock_loss(case[0], rows), rel=1e-5, abs=1e-5)
    for one, other in zip(gradients, others, strict=True):
        assert float((one - other).norm()) <= 1e-5 * float(one.norm()) + 1e-7


@settings(max_examples=8, deadline=None)
@given(rows=examples(), limits=st.sampled_from([Limits(None, 4096), Limits(None, 20)]))
def test_trie_equals_padded_with_checkpointing(case: tuple[Any, LabelLoss], rows: list[Tokens], limits: Limits) -> None:
    """The backward attends a second time, along the same paths."""
    model = case[0]
    expected, gradients = loss_and_gradients(case, Packing(False, Limits(None, 4096), 0), rows)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    try:
        found, others = loss_and_gradients(case, Packing(True, limits, 0), rows)
    finally:
        model.eval()
        model.gradient_checkpointing_disable()
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    for one, other in zip(gradients, others, strict=True):
        assert float((one - other).norm()) <= 1e-5 * float(one.norm()) + 1e-7


@settings(max_examples=15, deadline=None)
@given(
    rows=examples(), most_queries=st.integers(1, 6), most_keys=st.integers(1, 60), copies=st.sampled_from([0.0, 99.0])
)
def test_long_segments_are_cut_and_keys_gathered_again(
    case: tuple[Any, LabelLoss], rows: list[Tokens], most_queries: int, most_keys: int, copies: float
) -> None:
    """What only long rows meet, on short ones: the limits of a row of queries, of a bucket, and of copies kept."""
    expected, gradients = loss_and_gradients(case, Packing(False, Limits(None, 4096), 0), rows)
    with (
        patch.object(trie_paths, "MIN_QUERIES", 1),
        patch.object(trie_paths, "MAX_QUERIES", most_queries),
        patch.object(trie_paths, "MAX_KEYS", most_keys),
        patch.object(attention, "MAX_COPIES", copies),
    ):
        found, others = loss_and_gradients(case, Packing(True, Limits(None, 4096), 0), rows)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    for one, other in zip(gradients, others, strict=True):
        assert float((one - other).norm()) <= 1e-5 * float(one.norm()) + 1e-7


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
