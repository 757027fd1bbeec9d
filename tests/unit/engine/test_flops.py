"""Counted operations, against those that PyTorch counts while it runs them, and against masks written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.architecture_table import DENSE
from tests.helpers.architectures import random_model, tiny
from tests.helpers.shared_prefixes import rows_with_shared_prefixes
from trainer.config import load
from trainer.data.batching.micro_batch import MicroBatch, Tokens, collate_padded, collate_trie
from trainer.engine.flops import ModelFlops, count_flops
from trainer.kernels.label_loss import LabelLoss
from trainer.methods import attach
from trainer.models.embedded import resolve
from trainer.models.loading import load_model


def rows(*lengths: int) -> list[Tokens]:
    """Rows that share nothing, with the last three tokens in the loss."""
    first = np.arange(len(lengths), dtype=np.int32)
    return [
        Tokens(np.concatenate([[k], np.full(n - 1, 20 + k, np.int32)]).astype(np.int32), np.arange(n) >= n - 3)
        for k, n in zip(first, lengths, strict=True)
    ]


def flops_that_run(model: Any, batch: MicroBatch) -> int:
    """Forward and backward in eager attention, which computes hidden pairs too."""
    model.set_attn_implementation("eager")
    model.enable_input_require_grads()  # the gradient of every layer's input, the first one's too
    with FlopCounterMode(display=False) as counter:
        LabelLoss(model)(model, batch).backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "phi3", "qwen3", "mixtral", "shared experts"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_as_many_as_run(name: str, method: str) -> None:
    torch.manual_seed(0)
    model = tiny(name)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # a loop over experts, whose products are counted
    if method == "lora":
        model = attach(model, load(["method=lora", "method.r=4", "method.dropout=0"]).method, seed=0)
    batch = collate_padded(rows(24, 24, 24), range(3), 0)
    found = count_flops(model)
    tokens, width = 3 * 24, 24
    hidden = found.per_pair * 2 * 3 * (width * width - width * (width + 1) // 2)
    expected = flops_that_run(model, batch) - hidden
    # positions are multiplied by frequencies too, and routers choose experts in more than products
    assert found.of_batches([batch]) == pytest.approx(expected, rel=2e-3)
    assert found.per_token * tokens > 0.5 * expected


def test_llama_by_hand() -> None:
    """Two layers of width 32: q, o of 32 × 32, k, v of 32 × 16, an MLP of 3 × 32 × 48; 4 heads of 8, 40 words."""
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    full = count_flops(tiny("llama"))
    assert full == ModelFlops(6 * 2 * layer, 6 * 40 * 32, 12 * 4 * 8, ((None, 2),))
    model = attach(tiny("llama"), load(["method.r=4", "method.target_modules=attention_min"]).method, seed=0)
    trained = (32 + 32) * 4 + (32 + 16) * 4  # of q and v, a layer
    assert count_flops(model) == ModelFlops(2 * (4 * layer + 6 * trained), 4 * 40 * 32, 12 * 4 * 8, ((None, 2),))


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("mistral, window 8", {8: 2}),
        ("gemma3", {8: 1, None: 1}),
        ("mamba", {}),
    ],
)
def test_layers_have_their_windows(name: str, layers: dict[int | None, int]) -> None:
    assert dict(count_flops(tiny(name)).layers) == layers


def test_layers_with_heads_of_their_own_count_by_their_cost() -> None:
    """Gemma 4: two layers with a window and heads of 8, two without and heads of 16."""
    found = count_flops(random_model(DENSE["gemma4"]))
    assert found.per_pair == 12 * 4 * 8
    assert dict(found.layers) == {8: 2, None: 4}


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_base_costs_what_it_does_in_16_bits(bits: int) -> None:
    found = []
    for held in (16, bits):
        config = load(["debug=tiny", f"method.bits={held}"])
        cpu, dtype = torch.device("cpu"), torch.bfloat16
        base = load_model(resolve("tiny"), config.model, config.method, dtype, cpu, 2)
        found.append(count_flops(attach(base, config.method, seed=0)))
    assert found[0] == found[1]


def test_tied_and_untied_embeddings_cost_the_same() -> None:
    assert count_flops(tiny("llama", tie_word_embeddings=True)) == count_flops(tiny("llama"))


@settings(max_examples=100, deadline=None)
@given(rows_with_shared_prefixes(), st.one_of(st.none(), st.integers(1, 12)))
def test_pairs_are_those_of_the_masks(examples: list[Tokens], window: int | None) -> None:
    flops = ModelFlops(0.0, 0.0, 1.0, ((window, 1),))
    lengths = np.asarray([len(e.ids) for e in examples])
    width = int(lengths.max())

    def pairs(length: int) -> int:
        distance = np.arange(length)[:, None] - np.arange(length)[None, :]
        return int(((distance >= 0) & (distance < (window or length))).sum())

    assert flops.of_rows(lengths, 0) == sum(map(pairs, lengths.tolist()))
    assert flops.of_batches([collate_padded(examples, range(len(examples)), 0)]) == len(examples) * pairs(width)
    # a node of the trie, which is a distinct prefix, sees itself and its ancestors
    prefixes = {tuple(e.ids[: n + 1].tolist()) for e in examples for n in range(len(e.ids))}
    expected = sum(min(len(prefix), window or len(prefix)) for prefix in prefixes)
    assert flops.of_batches([collate_trie(examples, range(len(examples)))]) == expected <= flops.of_rows(lengths, 0)


def test_rows_that_share_nothing_cost_the_same_however_they_are_laid() -> None:
    examples = rows(17, 17, 17, 17)
    model = ModelFlops(3.0, 5.0, 7.0, ((None, 1), (4, 2)))
    padded, trie = collate_padded(examples, range(4), 0), collate_trie(examples, range(4))
    one_by_one = [collate_padded([e], [0], 0) for e in examples]
    costs = [model.of_batches(batches) for batches in ([padded], [trie], one_by_one)]
    assert costs == [model.of_rows(np.full(4, 17), 4 * 3)] * 3
