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

ROWS = 64
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
    """64 headlines, LoRA on attention with B away from zero, so that A has a gradient too.

    In fp32 the two are one to rounding. In bf16 each is off from fp32 by the dtype's own error; a trie may be no
    further off than padded rows are.
    """
    config = load([f"model.name_or_path={folder}", "data=headlines", "data.max_rows=64", "data.validation=0",
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
    found = {"trie bf16": gradient(model, loss, trie, rows), "padded bf16": gradient(model, loss, padded, rows)}
    model.float()
    found |= {"trie fp32": gradient(model, loss, trie, rows), "padded fp32": gradient(model, loss, padded, rows)}
    exact = found["padded fp32"]
    distances = {name: apart(g, exact) for name, g in found.items()}
    distances["trie bf16 from padded bf16"] = apart(found["trie bf16"], found["padded bf16"])
    print({name: f"1 - {d:.1e}" for name, d in distances.items()})
    record_property("one minus cosine", distances)
    assert float((found["trie fp32"] - exact).norm() / exact.norm()) <= 1e-4
    assert distances["trie bf16"] <= 2 * distances["padded bf16"] + 1e-5
