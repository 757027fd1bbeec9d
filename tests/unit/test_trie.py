"""The token trie and its attention: the loss and every gradient of the separate rows, whatever the rows are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from trainer.attention import KERNEL, along, register
from trainer.data.batches import Limits
from trainer.data.micro import Bucket, MicroBatch, Tokens
from trainer.data.packing import Packing
from trainer.data.trie import Trie, build
from trainer.loss import LabelLoss
from trainer.proof import prove, why_not

VOCABULARY = 40
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # attention far from uniform: a wrong mask shows
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.3}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral, window 8": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=8)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(**GPT2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=1)
    ),
}

# Few token ids, so that beginnings are shared by chance; sometimes a long common one.
ids = st.lists(st.integers(0, 2), min_size=1, max_size=9)
row_ids = st.one_of(ids, st.builds(lambda n, tail: [3] * n + tail, st.integers(0, 12), ids))


@st.composite
def examples(draw: st.DrawFn) -> list[Tokens]:
    rows = draw(st.lists(row_ids, min_size=1, max_size=8))
    rows += [rows[0]] * draw(st.integers(0, 1))  # an equal one
    rows += [rows[0][: draw(st.integers(1, len(rows[0])))]]  # a beginning of another
    labels = [draw(st.lists(st.booleans(), min_size=len(r), max_size=len(r))) for r in rows]
    return [Tokens(np.asarray(r, np.int32), np.asarray(lab, bool)) for r, lab in zip(rows, labels, strict=True)]


@settings(max_examples=300, deadline=None)
@given(examples())
def test_nodes_are_the_distinct_beginnings(rows: list[Tokens]) -> None:
    trie = build([r.ids for r in rows], [r.labels for r in rows])
    words = [tuple(r.ids.tolist()) for r in rows]
    assert len(trie.ids) == len({w[:k] for w in words for k in range(1, len(w) + 1)})
    for node in range(len(trie.ids)):
        above, at = [], node
        while at >= 0:
            above.append(at)
            at = int(trie.parents[at])
        beginning = tuple(int(trie.ids[a]) for a in reversed(above))
        depth = len(beginning) - 1
        assert trie.depths[node] == depth
        path = next(p for p, start in zip(trie.paths, trie.starts, strict=True) if node in p[start:])
        assert above[::-1] == path[: depth + 1].tolist()
        learnt = sum(bool(r.labels[depth]) for r, w in zip(rows, words, strict=True) if w[: depth + 1] == beginning)
        assert trie.weights[node] == (learnt if depth else 0)


@settings(max_examples=200, deadline=None)
@given(examples(), st.integers(1, 8), st.integers(3, 60), st.one_of(st.none(), st.integers(1, 4)))
def test_split_lays_every_example_once_within_the_limits(
    rows: list[Tokens], world_size: int, tokens: int, most_rows: int | None
) -> None:
    layout = Packing(True, Limits(most_rows, tokens), 0).split(rows, world_size)
    assert sorted(i for rank in layout.micros for micro in rank for i in micro) == list(range(len(rows)))
    assert len({len(rank) for rank in layout.micros}) == 1
    computed = 0
    for micro in (m for rank in layout.micros for m in rank if m):
        nodes = len(build([rows[i].ids for i in micro], [rows[i].labels for i in micro]).ids)
        computed += nodes
        assert len(micro) <= (most_rows or len(rows))
        assert most_rows is not None or nodes <= tokens or len(micro) == 1
    assert computed == layout.computed_tokens


@pytest.fixture(scope="module", params=list(MODELS))
def case(request: pytest.FixtureRequest) -> tuple[Any, LabelLoss]:
    torch.manual_seed(0)
    # double: what is left of a difference is the fp32 of the loss, not the order of sums in the model
    model = MODELS[request.param]().double()
    register()
    model.set_attn_implementation(KERNEL)
    assert why_not(model) is None
    return model, LabelLoss(model)


def loss_and_gradients(case: tuple[Any, LabelLoss], packing: Packing, rows: list[Tokens]) -> tuple[float, list[Tensor]]:
    model, loss = case
    model.zero_grad()
    total = 0.0
    for micro in packing.split(rows, 1).micros[0]:
        batch = packing.lay([rows[i] for i in micro], micro)
        with along(batch.paths):
            value = loss(model, batch)
            value.backward()
        total += value.item()
    return total, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def stock_loss(model: Any, rows: list[Tokens]) -> float:
    """Row by row through transformers' own forward and its own causal mask."""
    total = 0.0
    for row in rows:
        logits = model(torch.from_numpy(row.ids.astype(np.int64))[None], use_cache=False).logits[0]
        learnt = torch.from_numpy(np.flatnonzero(row.labels[1:]))
        targets = torch.from_numpy(row.ids[1:].astype(np.int64))
        total += torch.nn.functional.cross_entropy(logits[learnt], targets[learnt], reduction="sum").item()
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


LONG = [
    Tokens(np.asarray([5, 6, 7, 8] * 4 + [tail, 9, 10, tail], np.int32), np.asarray([False] * 14 + [True] * 6))
    for tail in (1, 2, 3, 4)
]


def test_the_proof_accepts_what_is_right(case: tuple[Any, LabelLoss]) -> None:
    proof = prove(*case, LONG, pad_id=0)
    assert proof.loss_distance <= 1e-5
    assert proof.gradient_distance <= 1e-4


def wrong_window(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Bucket.mask
    monkeypatch.setattr(Bucket, "mask", lambda self, window: right(self, None if window else 8))


def wrong_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a subtree ended too late: one row of queries sees its neighbour's tail."""
    right = MicroBatch.to

    def shifted(self: MicroBatch, device: torch.device) -> MicroBatch:
        moved = right(self, device)
        for bucket in moved.paths.buckets if moved.paths else []:
            bucket.keys[0] = bucket.keys[1]
        return moved

    monkeypatch.setattr(MicroBatch, "to", shifted)


def wrong_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    import trainer.data.micro as micro

    def deeper(ids: list[np.ndarray], labels: list[np.ndarray]) -> Trie:
        trie = build(ids, labels)
        trie.depths[len(trie.depths) // 2 :] += 1
        return trie

    monkeypatch.setattr(micro, "build", deeper)


@pytest.mark.parametrize("mistake", [wrong_window, wrong_keys, wrong_depth])
def test_the_proof_catches(case: tuple[Any, LabelLoss], mistake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mistake(monkeypatch)
    proof = prove(*case, LONG, pad_id=0)
    assert max(proof.loss_distance, proof.gradient_distance) > 1e-2
