"""The trie kernel guards its context: a trie without one, or anything else inside one, raises; the rest is SDPA."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.architectures import tiny
from trainer.data.batching.micro_batch import MicroBatch, Tokens
from trainer.data.batching.packing import Packing
from trainer.data.batching.rank_split import Limits
from trainer.kernels.label_loss import LabelLoss
from trainer.kernels.trie_attention import KERNEL, register, trie_context


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
