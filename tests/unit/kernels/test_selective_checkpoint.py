"""Selective checkpointing: the gradients of no checkpointing, without the large products a second time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.helpers.architectures import tiny
from trainer.kernels.lora_linear import patch_lora_linears
from trainer.kernels.selective_checkpoint import checkpoint_arguments, keep_linears

IDS = torch.arange(5, 35).view(2, 15)
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


class Count(TorchDispatchMode):
    """Counts matrix products over and of many columns, and everything else."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.others = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_large = func in PRODUCTS and min(args[-2].shape[1], args[-1].shape[1]) >= 16
        self.products += is_large
        self.others += not is_large
        return func(*args, **(kwargs or {}))


def run(model: Any, way: bool | str) -> tuple[list[Tensor], Count]:
    model.gradient_checkpointing_disable()
    if way:
        model.gradient_checkpointing_enable(checkpoint_arguments(way == "selective"))
    model.train()
    logits = model(input_ids=IDS, use_cache=False).logits
    with Count() as backward:
        found = torch.autograd.grad(logits.square().mean(), [p for p in model.parameters() if p.requires_grad])
    return list(found), backward


@pytest.mark.parametrize(("method", "fused"), [("lora", False), ("lora", True), ("full", False)])
def test_gradients_are_those_without_it(method: str, fused: bool) -> None:
    torch.manual_seed(0)
    model: Any = tiny("llama")
    assert keep_linears(model)
    if method == "lora":
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        model.enable_input_require_grads()
    if fused:
        assert patch_lora_linears(model) is not None
    expected, plain = run(model, False)
    whole, repeated = run(model, True)
    found, selective = run(model, "selective")
    for one, other, again in zip(found, expected, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(again, other, rtol=1e-5, atol=1e-6)
    assert selective.products == plain.products < repeated.products
    assert selective.others > plain.others


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_kept_linear_layer_is_a_linear_layer(bias: bool, autocast: bool) -> None:
    torch.manual_seed(0)
    stock = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=bias), torch.nn.GELU(), torch.nn.Linear(8, 4, bias=bias))
    patched = copy.deepcopy(stock)
    assert keep_linears(patched)
    x = torch.randn(3, 5, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = stock(x)
        found = checkpoint(patched, x, **checkpoint_arguments(selective=True))
    assert torch.equal(found, expected)
    gradients = torch.autograd.grad(found.float().square().sum(), [x, *patched.parameters()])
    stocks = torch.autograd.grad(expected.float().square().sum(), [x, *stock.parameters()])
    for one, other in zip(gradients, stocks, strict=True):
        torch.testing.assert_close(one, other)


def test_there_is_nothing_to_keep_without_dense_linear_layers() -> None:
    assert not keep_linears(tiny("gpt2"))
