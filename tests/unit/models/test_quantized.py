"""A base held in 4 or 8 bits: what training sees is not changed by an evaluation in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainer.config import load
from trainer.methods import attach, trainable_parameters
from trainer.models.embedded import resolve
from trainer.models.loading import load_model

IDS = torch.arange(5, 45).view(4, 10)


def gradients(model: Any) -> torch.Tensor:
    model.train()
    model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS, use_cache=False).loss.backward()
    found = torch.cat([p.grad.flatten() for p in trainable_parameters(model).values()])
    model.zero_grad()
    return found


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_evaluation_leaves_training_as_it_was(bits: int, dtype: torch.dtype) -> None:
    """bitsandbytes' 4-bit kernel for evaluation on CPU has no backward, and a layer that has met it once keeps it: LoRA
    then trained without the gradient that flows through the base."""
    config = load(["debug=tiny", f"method.bits={bits}"])
    base = load_model(resolve("tiny"), config.model, config.method, dtype, torch.device("cpu"), 2)
    model = attach(base, config.method, seed=0)
    for name, parameter in trainable_parameters(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    before = gradients(model)
    model.eval()
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    assert torch.equal(gradients(model), before)
