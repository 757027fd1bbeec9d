"""RMSNorm that keeps its input and one number a row for the backward.

The modules of transformers compute in fp32 step by step, and autograd keeps what each step needs: several fp32 copies
of the hidden states in each norm. Here the same formula has its backward written out. On CPU it takes 0.4 of the time
(576 wide, bf16, 2 cores), and its memory is the input's, which the residual stream keeps anyway.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def patch_rms_norms(model: nn.Module) -> int:
    """Give the model's RMSNorms this forward, where it computes what their own does.

    Some models norm otherwise (Gemma scales by one more than the weight): each module is tried, and those that differ
    stay as they are.

    Returns:
        how many were changed.
    """
    changed = 0
    for module in model.modules():
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if type(module).__name__.endswith("RMSNorm") and isinstance(eps, float) and _is_plain(module, eps):
            module.forward = partial(_forward, module, eps)
            changed += 1
    return changed


def _forward(module: nn.Module, eps: float, hidden_states: Tensor) -> Tensor:
    # the weight is looked up at each call: DeepSpeed and PEFT may put another tensor there
    return RMSNorm.apply(hidden_states, module.weight, eps)


def _is_plain(module: nn.Module, eps: float) -> bool:
    """Whether the module's forward is the weight times the input over its root mean square."""
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
        found = RMSNorm.apply(tried, weight, eps)
    near = 8 * max(torch.finfo(weight.dtype).eps, torch.finfo(torch.float32).eps)  # theirs reckon in fp32
    return own.dtype == found.dtype and torch.allclose(own.float(), found.float(), rtol=near, atol=near)


class RMSNorm(torch.autograd.Function):
    """Root mean square layer normalisation (Zhang and Sennrich, 2019), reckoned in fp32 at least."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        """``weight * hidden / sqrt(mean(hidden²) + eps)``, the mean over the last dimension.

        Args:
            hidden: (…, width).
            weight: (width,).
            eps: keeps rows of zeros finite.
        """
        exact = _exact(hidden)
        scale = (
            torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square_().div_(hidden.shape[-1]).add_(eps).rsqrt_()
        )
        ctx.save_for_backward(hidden, weight, scale)
        return exact.mul_(scale).to(hidden.dtype) * weight

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, scale = ctx.saved_tensors
        exact = _exact(hidden).mul_(scale)
        inner = _exact(outer[0])
        of_weight = (inner * exact).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        inner.mul_(weight)
        along = torch.einsum("...d,...d->...", inner, exact).unsqueeze(-1) / hidden.shape[-1]
        return inner.addcmul_(exact, along, value=-1).mul_(scale).to(hidden.dtype), of_weight, None


def _exact(tensor: Tensor) -> Tensor:
    """A copy in fp32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
