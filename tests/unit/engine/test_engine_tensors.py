"""A method's view of whole tensors without ZeRO: a gradient that was handed out is not changed by clipping."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from trainer.engine.whole_state import EngineTensors


def test_a_gradient_outlives_clipping() -> None:
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.full((3,), 4.0)
    world = SimpleNamespace(device=torch.device("cpu"), is_main=True)
    engine: Any = SimpleNamespace(world=world, trainable_params={"a": parameter}, zero_stage=0)
    tensors = EngineTensors(engine)
    gradient = tensors.gradient("a")
    nn.utils.clip_grad_norm_([parameter], 0.1)
    assert torch.equal(gradient, torch.full((3,), 4.0))
    tensors.set_weight("a", torch.zeros(3))
    assert torch.equal(tensors.weight("a"), torch.zeros(3))
    assert tensors.shape("a") == torch.Size([3])
    assert list(tensors.names()) == ["a"]
