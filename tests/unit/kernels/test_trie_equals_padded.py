"""Attention over a trie: the loss and every gradient of the separate rows, whatever the rows are."""

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
from tests.helpers.shared_prefixes import rows_with_shared_prefixes
from trainer.data.batching import trie_paths
from trainer.data.batching.micro_batch import Tokens
from trainer.data.batching.packing import Packing
from trainer.data.batching.rank_split import Limits
from trainer.kernels import trie_attention as attention
from trainer.kernels import varlen_attention as varlen
from trainer.kernels.label_loss import LabelLoss
from trainer.kernels.trie_attention import KERNEL, register, trie_context

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
@given(rows=rows_with_shared_prefixes(), limits=st.sampled_from([Limits(None, 4096), Limits(None, 20), Limits(2, 0)]))
def test_trie_equals_padded(case: tuple[Any, LabelLoss], rows: list[Tokens], limits: Limits) -> None:
    expected, gradients = loss_and_gradients(case, Packing(False, Limits(None, 4096), 0), rows)
    found, others = loss_and_gradients(case, Packing(True, limits, 0), rows)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert found == pytest.approx(stock_loss(case[0], rows), rel=1e-5, abs=1e-5)
    for one, other in zip(gradients, others, strict=True):
        assert float((one - other).norm()) <= 1e-5 * float(one.norm()) + 1e-7


@settings(max_examples=8, deadline=None)
@given(rows=rows_with_shared_prefixes(), limits=st.sampled_from([Limits(None, 4096), Limits(None, 20)]))
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
    rows=rows_with_shared_prefixes(),
    most_queries=st.integers(1, 6),
    most_keys=st.integers(1, 60),
    copies=st.sampled_from([0.0, 99.0]),
    is_short=st.booleans(),
)
def test_long_segments_are_cut_and_keys_gathered_again(
    case: tuple[Any, LabelLoss],
    rows: list[Tokens],
    most_queries: int,
    most_keys: int,
    copies: float,
    is_short: bool,
) -> None:
    """What only long rows meet, on short ones: the limits of a row of queries, of a bucket, and of copies kept; and
    SDPA as CUDA calls it, with the query heads of a key head side by side."""
    expected, gradients = loss_and_gradients(case, Packing(False, Limits(None, 4096), 0), rows)
    with (
        patch.object(trie_paths, "MIN_QUERIES", 1),
        patch.object(trie_paths, "MAX_QUERIES", most_queries),
        patch.object(trie_paths, "MAX_KEYS", most_keys),
        patch.object(attention, "MAX_COPIES", copies),
        patch.object(attention, "is_short", lambda *_: is_short),
        patch.object(attention, "packs_query_heads", lambda _: not is_short),
    ):
        found, others = loss_and_gradients(case, Packing(True, Limits(None, 4096), 0), rows)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    for one, other in zip(gradients, others, strict=True):
        assert float((one - other).norm()) <= 1e-5 * float(one.norm()) + 1e-7


@settings(max_examples=15, deadline=None)
@given(rows=rows_with_shared_prefixes(), uses_trie=st.booleans(), copies=st.sampled_from([0.0, 99.0]))
def test_pieces_equal_padded(case: tuple[Any, LabelLoss], rows: list[Tokens], uses_trie: bool, copies: float) -> None:
    """The layout of varlen calls: of tries, and of padded rows without a mask, whose padding no token sees."""
    expected, gradients = loss_and_gradients(case, Packing(False, Limits(None, 4096), 0), rows)
    with patch.object(varlen, "MAX_COPIES", copies):
        found, others = loss_and_gradients(case, Packing(uses_trie, Limits(None, 4096), 0, in_pieces=True), rows)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    for one, other in zip(gradients, others, strict=True):
        assert float((one - other).norm()) <= 1e-5 * float(one.norm()) + 1e-7
