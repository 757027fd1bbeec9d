"""The trie kernel guards its context: a trie without one, or anything else inside one, raises; the rest is SDPA."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.helpers.architectures import tiny
from tests.helpers.shared_prefixes import rows_with_shared_prefixes
from trainer.data.batching.micro_batch import MicroBatch, Tokens
from trainer.data.batching.packing import Packing
from trainer.data.batching.rank_split import Limits
from trainer.kernels.label_loss import LabelLoss
from trainer.kernels.trie_attention import KERNEL, register, trie_attention, trie_context, trie_mask


@pytest.fixture(params=["llama", "mistral, window 8"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    model = tiny(request.param).eval()
    register()
    model.set_attn_implementation(KERNEL)
    return model


def collate(uses_trie: bool, *rows: list[int]) -> MicroBatch:
    examples = [Tokens(np.asarray(row, np.int32), np.ones(len(row), dtype=bool)) for row in rows]
    return Packing(uses_trie, Limits(None, 4096), 0).collate(examples, range(len(rows)))


def test_a_trie_without_its_context_raises(model: Any) -> None:
    loss = LabelLoss(model)
    with pytest.raises(RuntimeError, match="trie_context"):
        loss(model, collate(True, [5, 6, 7], [5, 6, 8]))


def test_gradient_checkpointing_recomputes_inside_the_context_only(model: Any) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    batch = collate(True, [5, 6, 7], [5, 6, 8])
    with trie_context(batch.paths):
        value = LabelLoss(model)(model, batch)
    with pytest.raises(RuntimeError, match="trie_context"):
        value.backward()


@pytest.mark.parametrize(
    ("uses_trie", "rows"),
    [
        (False, ([5, 6, 7, 9],)),  # as many tokens as the trie has nodes
        (False, ([5, 6], [7, 8], [9, 4])),
        (False, ([5, 6, 7, 9], [3])),
        (True, ([5, 6, 7], [5, 9, 8])),
    ],
)
def test_padded_rows_and_another_trie_inside_a_context_raise(
    model: Any, uses_trie: bool, rows: tuple[list[int], ...]
) -> None:
    trie = collate(True, [5, 6, 7], [5, 6, 8])
    with trie_context(trie.paths), pytest.raises(RuntimeError, match="trie_context"):
        LabelLoss(model)(model, collate(uses_trie, *rows))


def test_padded_rows_and_generation_outside_a_context_are_sdpa(model: Any) -> None:
    ids = torch.tensor([[5, 6, 7, 9], [0, 0, 4, 3]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    found = []
    for kernel in ("sdpa", KERNEL):
        model.set_attn_implementation(kernel)
        with torch.no_grad():
            logits = model(ids, attention_mask=mask).logits
            prompts = ((ids, mask), (ids[:1, :1], mask[:1, :1]), (ids[:1, :1], None))
            texts = [
                model.generate(p, attention_mask=m, max_new_tokens=4, do_sample=False, pad_token_id=0)
                for p, m in prompts
            ]
        found.append((logits, *texts))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_trie_of_one_node_attends_to_itself_inside_and_outside(model: Any) -> None:
    """Its mask looks like that of a row of one token."""
    batch = collate(True, [5])
    loss = LabelLoss(model)
    with torch.no_grad():
        outside = loss.logits(model, batch)
        with trie_context(batch.paths):
            inside = loss.logits(model, batch)
    torch.testing.assert_close(inside, outside)


@settings(max_examples=25, deadline=None)
@given(
    rows=rows_with_shared_prefixes(),
    layout=st.sampled_from([(True, False), (True, True), (False, True)]),
    trials=st.integers(1, 4),
    window=st.sampled_from([None, 3]),
)
def test_trials_attend_as_each_does_alone(
    rows: list[Tokens], layout: tuple[bool, bool], trials: int, window: int | None
) -> None:
    uses_trie, in_pieces = layout
    batch = Packing(uses_trie, Limits(None, 4096), 0, in_pieces=in_pieces).collate(rows, range(len(rows)))
    count, tokens = batch.input_ids.shape
    generator = torch.Generator().manual_seed(0)
    shapes = [(trials * count, heads, tokens, 8) for heads in (4, 2, 2)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    outer = torch.randn(trials * count, tokens, 4, 8, generator=generator, dtype=torch.float64)

    def attend(tensors: list[Tensor], outer: Tensor, trials: int) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        with trie_context(batch.paths, trials):
            mask = trie_mask(torch.device("cpu"))
            out, _ = trie_attention(nn.Identity(), *leaves, mask, sliding_window=window)
            return [out.detach(), *torch.autograd.grad(out, leaves, outer)]

    alone = [
        attend([t[k : k + count] for t in inputs], outer[k : k + count], 1) for k in range(0, trials * count, count)
    ]
    for found, *each in zip(attend(inputs, outer, trials), *alone, strict=True):
        torch.testing.assert_close(found, torch.cat(each), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("in_pieces", [False, True])
def test_a_forward_of_more_or_fewer_trials_raises(model: Any, in_pieces: bool) -> None:
    examples = [Tokens(np.asarray(row, np.int32), np.ones(3, dtype=bool)) for row in ([5, 6, 7], [5, 6, 8])]
    batch = Packing(True, Limits(None, 4096), 0, in_pieces=in_pieces).collate(examples, range(2))
    loss = LabelLoss(model)
    with trie_context(batch.paths, 2):
        assert len(set(loss(model, batch, 2).tolist())) == 1
        for trials in (None, 3):
            with pytest.raises(RuntimeError, match="trie_context of 2 × 4"):
                loss(model, batch, trials)


@pytest.mark.parametrize("in_pieces", [False, True])
def test_a_layer_may_have_the_rows_of_one_trial_where_they_are_shared(model: Any, in_pieces: bool) -> None:
    examples = [Tokens(np.asarray(row, np.int32), np.ones(3, dtype=bool)) for row in ([5, 6, 7], [5, 6, 8])]
    batch = Packing(True, Limits(None, 4096), 0, in_pieces=in_pieces).collate(examples, range(2))
    loss = LabelLoss(model)
    with trie_context(batch.paths):
        alone = loss(model, batch).item()
    with trie_context(batch.paths, 2, shared=True):
        assert loss(model, batch).item() == pytest.approx(alone)
        assert loss(model, batch, 2).tolist() == pytest.approx([alone, alone])
        with pytest.raises(RuntimeError, match="trie_context of 2 × 4"):
            loss(model, batch, 3)
