"""On a real model and real rows: a trie's adapter gradient against padded rows', in bf16 and in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.config import load
from trainer.data.batching.micro_batch import Tokens
from trainer.data.batching.packing import Packing
from trainer.data.batching.rank_split import Limits
from trainer.data.load import load_data
from trainer.errors import ModelError
from trainer.kernels.label_loss import LabelLoss
from trainer.kernels.trie_attention import trie_context
from trainer.methods import attach
from trainer.models.loading import load_model, load_tokenizer

ROWS = 16
# A CPU without 16-bit units multiplies bf16 some twenty times slower than fp32.
BF16_ROWS = 3
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    try:
        return request.getfixturevalue("smollm2")
    except ModelError as error:
        pytest.skip(f"SmolLM2-135M cannot be fetched: {error}")


def gradient(model: Any, loss: LabelLoss, packing: Packing, rows: list[Tokens]) -> Tensor:
    """Of the summed loss, over all adapter tensors, summed over the forwards in fp64."""
    trained = [p for p in model.parameters() if p.requires_grad]
    total = torch.zeros(sum(p.numel() for p in trained), dtype=torch.float64)
    for micro in packing.split(rows, 1).micros[0]:
        batch = packing.collate([rows[i] for i in micro], micro)
        with trie_context(batch.paths):
            parts = torch.autograd.grad(loss(model, batch), trained)
        total += torch.cat([p.flatten() for p in parts])
    return total


def apart(one: Tensor, other: Tensor) -> float:
    """One minus the cosine."""
    return 1 - float(one @ other / (one.norm() * other.norm()))


@pytest.mark.slow
def test_trie_gradient_is_the_padded_one(folder: Path, record_property: pytest.RecordProperty) -> None:
    """Headlines, LoRA on attention with B away from zero, so that A has a gradient too.

    In fp32 the two are one to rounding. In bf16 each is off from fp32 by the dtype's own error; a trie may be no
    further off than padded rows are.
    """
    config = load([f"model.name_or_path={folder}", "data=headlines", f"data.max_rows={ROWS}", "data.validation=0",
                   f"batch.global_size={ROWS}", "method.target_modules=attention", "model.dtype=bf16"])  # fmt: skip
    data = load_data(config, load_tokenizer(str(folder), config.model))
    rows = data.train.tokens(range(ROWS))
    model: Any = attach(load_model(str(folder), config.model, config.method, torch.bfloat16, CPU, 2), config.method, 0)
    loss = LabelLoss(model.eval())
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    trie, padded = (Packing(uses_trie, Limits(None, 4096), 0) for uses_trie in (True, False))
    few = rows[:BF16_ROWS]
    trie_bf16, padded_bf16 = (gradient(model, loss, packing, few) for packing in (trie, padded))
    model.float()
    exact = gradient(model, loss, padded, few)
    distances = {"trie": apart(trie_bf16, exact), "padded": apart(padded_bf16, exact)}
    distances["trie from padded"] = apart(trie_bf16, padded_bf16)
    print({name: f"1 - {d:.1e}" for name, d in distances.items()})
    record_property("one minus cosine in bf16", distances)
    assert distances["trie"] <= 2 * distances["padded"] + 1e-5
    exact = gradient(model, loss, padded, rows)
    assert float((gradient(model, loss, trie, rows) - exact).norm() / exact.norm()) <= 1e-4
