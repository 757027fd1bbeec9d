"""The memory that is told at the start is what weights, gradients and the optimizer's tensors take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from trainer.config.optimizers import OPTIMIZERS
from trainer.config.schema import OptimConfig, TrainConfig, ZeroConfig
from trainer.engine.optimizers import make_optimizer, split_for_muon, token_tables
from trainer.engine.state_bytes import optimizer_bytes, state_bytes


def config(**zero: Any) -> TrainConfig:
    return TrainConfig(zero=ZeroConfig(**zero))


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    layers = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 5))
    layers[0].requires_grad_(False)
    return layers.to(dtype)


FROZEN, TRAINED = 10 * 20 + 20, 20 * 5 + 5


def test_one_device_holds_what_torch_allocates() -> None:
    layers = model()
    optimizer = torch.optim.AdamW([p for p in layers.parameters() if p.requires_grad])
    layers(torch.ones(3, 10)).sum().backward()
    optimizer.step()
    states = [v for state in optimizer.state.values() for v in state.values() if v.dim()]
    held = [*layers.parameters(), *(p.grad for p in layers.parameters() if p.grad is not None), *states]
    assert state_bytes(layers, config(stage=0), torch.float32, 1) == sum(t.numel() * t.element_size() for t in held)


def test_stages_split_what_they_say() -> None:
    half = model(torch.bfloat16)
    weights, gradients, optimizer = 2 * (FROZEN + TRAINED), 2 * TRAINED, 12 * TRAINED

    def found(stage: int, reduces_once: bool = False, **zero: str) -> int:
        return state_bytes(half, config(stage=stage, **zero), torch.bfloat16, 4, reduces_once)

    assert found(1) == weights + gradients + optimizer // 4
    assert found(2) == weights + gradients // 4 + optimizer // 4
    assert found(2, reduces_once=True) == weights + gradients + optimizer // 4
    assert found(3) == weights // 4 + gradients // 4 + optimizer // 4
    assert found(2, offload_optimizer="cpu") == weights + gradients // 4
    assert found(3, offload_optimizer="cpu", offload_params="cpu") == gradients // 4


FLATTENED = [(name, True) for name, optimizer in OPTIMIZERS.items() if not optimizer.needs_whole_matrices]


@pytest.mark.parametrize(("name", "flattened"), [*((name, False) for name in OPTIMIZERS), *FLATTENED])
def test_an_optimizer_holds_what_is_told(name: str, flattened: bool) -> None:
    layers = nn.Sequential(nn.Embedding(10, 60), nn.Linear(60, 100), nn.Linear(100, 5))
    trained = list(layers.parameters())
    if flattened:
        trained = [nn.Parameter(torch.cat([p.detach().flatten() for p in trained]))]
    groups = [{"params": trained}]
    optim = OptimConfig(name=name)
    wanted = split_for_muon(groups, token_tables(layers)) if name == "muon" else groups
    optimizer = make_optimizer(wanted, optim)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for key, value in state.items() if not key.startswith("qmap")]
    held = [value for value in states if torch.is_tensor(value) and value.dim()]
    assert optimizer_bytes(layers, name, flattened) == sum(t.numel() * t.element_size() for t in held)
