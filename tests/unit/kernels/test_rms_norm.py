"""The patched RMSNorm is the stock one: outputs, gradients, and only where it is the same formula."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tests.helpers.architectures import tiny
from trainer.kernels.rms_norm import patch_rms_norms


def pair(width: int, dtype: torch.dtype, eps: float = 1e-6) -> tuple[Any, Any]:
    stock = LlamaRMSNorm(width, eps).to(dtype)
    nn.init.normal_(stock.weight)
    patched = copy.deepcopy(stock)
    assert patch_rms_norms(nn.ModuleList([patched])) is not None
    return stock, patched


class Formula:
    """The norm as it is defined, in the dtype of its input: the stock module goes down to fp32."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden / (hidden.square().mean(-1, keepdim=True) + self.eps).sqrt()


def through(norm: Any, hidden: torch.Tensor, outer: torch.Tensor) -> list[torch.Tensor]:
    hidden = hidden.clone().requires_grad_()
    out = norm(hidden)
    return [out.detach(), *torch.autograd.grad(out, [hidden, norm.weight], outer)]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.sampled_from([(), (3,), (2, 5)]), st.sampled_from([1e-6, 1e-2]), st.integers(0, 99))
def test_same_numbers(width: int, shape: tuple[int, ...], eps: float, seed: int) -> None:
    """In double, whose rounding cannot hide a wrong formula; a row of zeros among the rows."""
    torch.manual_seed(seed)
    _, patched = pair(width, torch.float64, eps)
    formula = Formula(patched.weight, eps)
    hidden, outer = torch.randn(2, 4, *shape, width, dtype=torch.float64) * torch.tensor([1e-4, 9.0])[seed % 2]
    hidden[0] = 0
    for name, one, other in zip(
        ("output", "input", "weight"), *(through(n, hidden, outer) for n in (formula, patched))
    ):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_not_further_from_the_truth_in_bf16() -> None:
    torch.manual_seed(0)
    stock, patched = pair(256, torch.bfloat16)
    hidden, outer = torch.randn(2, 50, 256, dtype=torch.bfloat16)
    exact = through(copy.deepcopy(stock).double(), hidden.double(), outer.double())
    for one, other, true in zip(through(stock, hidden, outer), through(patched, hidden, outer), exact, strict=True):
        assert float((other - true).norm()) <= 1.05 * float((one - true).norm())


def test_input_is_left_as_it_is() -> None:
    _, patched = pair(8, torch.float32)
    hidden = torch.randn(3, 8)
    before = hidden.clone()
    through(patched, hidden, torch.ones(3, 8))
    assert torch.equal(hidden, before)


@pytest.mark.parametrize(("name", "changed"), [("llama", 5), ("qwen2", 5), ("gemma", 0), ("gpt2", 0)])
def test_only_where_it_is_the_same_formula(name: str, changed: int) -> None:
    """Gemma's weight counts from one; GPT-2 has LayerNorms."""
    torch.manual_seed(0)
    model = tiny(name)
    tokens = torch.arange(12)[None]
    expected = model(tokens).logits
    patch = patch_rms_norms(model)
    assert sum("forward" in vars(module) for module in model.modules()) == changed
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    assert (patch is not None) == (changed > 0)
    if patch is not None:
        patch.undo()
    assert torch.equal(model(tokens).logits, expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(8, 40), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 99))
def test_torchs_own_fused_norm_is_the_same_formula(width: int, dtype: torch.dtype, seed: int) -> None:
    """What CUDA takes, on CPU. Not of few columns: one alone has no gradient but its rounding."""
    torch.manual_seed(seed)
    stock, _ = pair(width, dtype)
    hidden, outer = torch.randn(2, 4, width, dtype=dtype)
    fused = nn.RMSNorm(width, 1e-6, dtype=dtype)
    fused.weight = stock.weight
    near = 8 * torch.finfo(dtype).eps
    for one, other in zip(through(fused, hidden, outer), through(stock, hidden, outer), strict=True):
        torch.testing.assert_close(one, other, rtol=near, atol=near * float(other.abs().max()))
