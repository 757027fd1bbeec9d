"""Checkpoint activations selectively: results of dense linear layers are kept, everything else is computed again.

The products are nearly all of a layer's arithmetic and a part of its activations only (Korthikanti et al., 2022).

torch's own selective checkpointing looks at every operation in Python, in the forward and again in the recomputation,
which costs more than the products on a fast GPU. Here only the layers whose results are kept know of it.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainer.kernels.patch import patch_forwards


@dataclass(slots=True)
class _Kept:
    """The results of one layer's forward, in order.

    Attributes:
        results: not yet given back.
        gives_back: in the recomputation, where they come from here.
    """

    results: deque[Tensor] = field(default_factory=deque)
    gives_back: bool = False


_kept: _Kept | None = None  # of the layer whose forward or recomputation is running


def checkpoint_arguments(selective: bool) -> dict[str, Any]:
    """Return the arguments of ``torch.utils.checkpoint`` for gradient checkpointing, whole or selective."""
    return {"use_reentrant": False, **({"context_fn": _contexts} if selective else {})}


def keep_linears(model: nn.Module) -> bool:
    """Let the dense linear layers of a model keep their results where :func:`checkpoint_arguments` asks for it.

    Returns:
        whether there are any: quantised layers are not dense.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linears = [module for module in model.modules() if type(module) is nn.Linear and module is not head]
    return patch_forwards([(module, partial(_forward, module)) for module in linears]) is not None


def is_keeping() -> bool:
    """Return whether results are being kept: they must not be changed in place then."""
    return _kept is not None and not _kept.gives_back


def kept(compute: Callable[[], Tensor]) -> Tensor:
    """Compute a result and keep it, or give back what was kept of the forward. Inside of an autograd function only:
    what is kept has no graph."""
    if _kept is None:
        return compute()
    if _kept.gives_back:
        return _kept.results.popleft()
    result = compute()
    _kept.results.append(result)
    return result


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of a forward and of its recomputation."""
    keeping = _Kept()
    return _inside(keeping), _inside(_Kept(keeping.results, gives_back=True))


@contextlib.contextmanager
def _inside(store: _Kept) -> Iterator[None]:
    global _kept
    outer, _kept = _kept, store
    try:
        yield
    finally:
        _kept = outer


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    weight, bias = layer.weight, layer.bias
    if _kept is None:
        return nn.functional.linear(x, weight, bias)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    product: Tensor = KeptLinear.apply(x, weight, bias)
    return product


class KeptLinear(torch.autograd.Function):
    """Computes ``x W' + bias``, or takes it from the forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return (…, out): ``x`` (…, in), ``weight`` (out, in), ``bias`` (out,)."""
        ctx.save_for_backward(x, weight)
        return kept(lambda: nn.functional.linear(x, weight, bias))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        gradient = grad_outputs[0]
        flat = gradient.reshape(-1, gradient.shape[-1])
        grad_x = gradient @ weight if wants_x else None
        grad_weight = flat.t() @ x.reshape(-1, x.shape[-1]) if wants_weight else None
        return grad_x, grad_weight, flat.sum(0) if wants_bias else None
