"""Compute LoRA's linear layers with the low-rank product added by one ``addmm``, forward and backward written out.

PEFT computes ``base(x) + B(A(dropout(x))) * scaling``: the low-rank product is written, scaled and added in passes of
their own, each over a tensor as large as the layer's output, and the backward repeats them. Here it is added inside the
matrix product, scaled on the side that is r wide, and the input is kept once.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainer.compat.deepspeed import is_partitioned
from trainer.kernels.patch import Patch, patch_forwards
from trainer.kernels.selective_checkpoint import is_keeping, kept

LAYERS = ("Linear", "Linear4bit", "Linear8bitLt")


def patch_lora_linears(model: nn.Module) -> Patch | None:
    """Patch the LoRA layers of a PEFT model with this forward; what it does not compute is left to PEFT, call by call.

    Returns:
        the patch, applied; ``None`` where there is no such layer.
    """
    return patch_forwards([(module, partial(_forward, module)) for module in model.modules() if is_lora_linear(module)])


def is_lora_linear(module: nn.Module) -> bool:
    """Return whether a module is PEFT's LoRA layer on a linear one, dense or quantised."""
    return type(module).__module__.startswith("peft.tuners.lora.") and type(module).__name__ in LAYERS


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs or not _is_plain(layer, x):
        return type(layer).forward(layer, x, *args, **kwargs)
    name, base = layer.active_adapters[0], layer.base_layer
    a, b, scaling = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    dropped = layer.lora_dropout[name](x)
    if dropped is x and is_frozen_dense(base, x):
        return LoraLinear.apply(x, base.weight, base.bias, a, b, scaling)
    result = base(x)
    if result.dtype != a.dtype:
        return type(layer).forward(layer, x)
    return AddLora.apply(result, dropped, a, b, scaling)


def _is_plain(layer: Any, x: Tensor) -> bool:
    """Return whether this call is that of one LoRA adapter as in its paper, in the dtype of its input, and whole: under
    ZeRO-3 a matrix that is not persistent is gathered by its own module's call only."""
    if layer.merged or layer.disable_adapters or layer.lora_variant or len(layer.active_adapters) != 1:
        return False
    name = layer.active_adapters[0]
    if name not in layer.lora_A or layer.lora_B[name].bias is not None or torch.is_autocast_enabled(x.device.type):
        return False
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return x.dtype == a.dtype and a.numel() > 0 and b.numel() > 0


def is_frozen_dense(base: nn.Module, x: Tensor) -> bool:
    """Return whether a layer under LoRA is a dense product in the dtype of ``x``, whole and not trained."""
    if type(base) is not nn.Linear or base.weight.dtype != x.dtype or is_partitioned(base.weight):
        return False
    return not any(p.requires_grad for p in base.parameters())


class LoraLinear(torch.autograd.Function):
    """Computes ``x W' + bias + s (x A') B'`` (Hu et al., 2021) with W and bias frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """Return (…, out).

        Args:
            x: (…, in).
            w: (out, in), the layer's own weight.
            bias: (out,), the layer's own.
            a: (r, in).
            b: (out, r).
            scaling: of the low-rank product.
        """
        flat = x.reshape(-1, x.shape[-1])
        inner = flat @ a.t()
        out = kept(lambda: nn.functional.linear(flat, w, bias))
        # In place there is no second tensor to copy to, unless the product is kept as it was.
        add = torch.addmm if is_keeping() else Tensor.addmm_
        out = add(out, inner, b.t(), alpha=scaling)
        ctx.save_for_backward(x, w, a, b, inner)
        ctx.scaling = scaling
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, w, a, b, inner = ctx.saved_tensors
        gradient = grad_outputs[0].reshape(-1, w.shape[0])
        inner_gradient, grad_a, grad_b = _low_rank_gradients(gradient, x, b, inner, ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (gradient @ w).addmm_(inner_gradient, a).view_as(x)
        return grad_x, None, None, grad_a, grad_b, None


class AddLora(torch.autograd.Function):
    """Adds ``s (x A') B'`` to the output of any layer: quantised, partitioned by ZeRO-3, behind dropout."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """Return (…, out); ``result``: (…, out), the rest as in :class:`LoraLinear`."""
        inner = x.reshape(-1, x.shape[-1]) @ a.t()
        out = torch.addmm(result.reshape(-1, b.shape[0]), inner, b.t(), alpha=scaling)
        ctx.save_for_backward(x, a, b, inner)
        ctx.scaling = scaling
        return out.view_as(result)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, inner = ctx.saved_tensors
        gradient = grad_outputs[0].reshape(-1, b.shape[0])
        inner_gradient, grad_a, grad_b = _low_rank_gradients(gradient, x, b, inner, ctx.scaling)
        grad_x = (inner_gradient @ a).view_as(x) if ctx.needs_input_grad[1] else None
        return grad_outputs[0], grad_x, grad_a, grad_b, None


def _low_rank_gradients(
    gradient: Tensor, x: Tensor, b: Tensor, inner: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``x A'`` (tokens, r), of A and of B."""
    inner_gradient = (gradient @ b).mul_(scaling)
    grad_a = inner_gradient.t() @ x.reshape(-1, x.shape[-1])
    return inner_gradient, grad_a, (gradient.t() @ inner).mul_(scaling)
