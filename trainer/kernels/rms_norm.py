"""Compute RMSNorm with a fused backward: it keeps its input and one number a row.

The modules of transformers compute in fp32 step by step, and autograd keeps what each step needs: several fp32 copies
of the hidden states in each norm. Here the same formula has its backward written out. On CPU it takes 0.4 of the time
(576 wide, bf16, 2 cores), and its memory is the input's, which the residual stream keeps anyway.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainer.kernels.patch import Patch, patch_forwards


def patch_rms_norms(model: nn.Module) -> Patch | None:
    """Patch the model's RMSNorms with this forward, where it computes what their own does.

    Some models norm otherwise (Gemma scales by one more than the weight): each module is tried, and those that differ
    stay as they are.

    Returns:
        the patch, applied; ``None`` where there is nothing to patch.
    """
    forwards = []
    for module in model.modules():
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if type(module).__name__.endswith("RMSNorm") and isinstance(eps, float) and _is_plain(module, eps):
            forwards.append((module, partial(_forward, module, eps)))
    return patch_forwards(forwards)


def _forward(module: nn.Module, eps: float, hidden_states: Tensor) -> Tensor:
    # the weight is looked up at each call: DeepSpeed and PEFT may put another tensor there
    return rms_norm(hidden_states, module.weight, eps)


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Norm ``hidden``, (…, width), and scale it by ``weight``, (width,): on CUDA by torch's own fused kernel."""
    if hidden.is_cuda and hidden.dtype == weight.dtype:
        return nn.functional.rms_norm(hidden, weight.shape, weight, eps)
    return RMSNorm.apply(hidden, weight, eps)


def _is_plain(module: nn.Module, eps: float) -> bool:
    """Return whether the module's forward is the weight times the input over its root mean square."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or weight.is_meta or not weight.is_floating_point():
        return False
    with torch.no_grad():
        tried = torch.linspace(-3, 2, 4 * len(weight), device=weight.device).view(4, -1).sin()
        tried = (tried * torch.tensor([1e-3, 0.1, 1.0, 30.0], device=weight.device)[:, None]).to(weight.dtype)
        try:
            own = module(tried)
        except (TypeError, RuntimeError):  # it wants more than hidden states
            return False
        found = rms_norm(tried, weight, eps)
    near = 8 * max(torch.finfo(weight.dtype).eps, torch.finfo(torch.float32).eps)  # theirs compute in fp32
    return own.dtype == found.dtype and torch.allclose(own.float(), found.float(), rtol=near, atol=near)


class RMSNorm(torch.autograd.Function):
    """Computes root mean square layer normalisation (Zhang and Sennrich, 2019), in fp32 at least."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        """``weight * hidden / sqrt(mean(hidden²) + eps)``, the mean over the last dimension.

        Args:
            hidden: (…, width).
            weight: (width,).
            eps: keeps rows of zeros finite.
        """
        normalized = _to_fp32(hidden)
        # a mean, which torch sums in pairs: dot products and norms have twice to five times its error on CPU
        scale = normalized.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        return normalized.mul_(scale).to(hidden.dtype) * weight

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, scale = ctx.saved_tensors
        normalized = _to_fp32(hidden).mul_(scale)
        gradient = _to_fp32(grad_outputs[0])
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (gradient * normalized).flatten(0, -2).sum(0).to(weight.dtype)
        gradient.mul_(weight)
        projection = torch.einsum("...d,...d->...", gradient, normalized).unsqueeze(-1) / hidden.shape[-1]
        return gradient.addcmul_(normalized, projection, value=-1).mul_(scale).to(hidden.dtype), grad_weight, None


def _to_fp32(tensor: Tensor) -> Tensor:
    """Return a copy in fp32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
