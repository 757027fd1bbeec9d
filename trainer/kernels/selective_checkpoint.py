"""Checkpoint activations selectively: results of large matrix products are kept, everything else is computed again.

The products are nearly all of a layer's arithmetic and a part of its activations only (Korthikanti et al., 2022). The
results of fused attention are kept too: they are as large as one projection's.

torch's own selective checkpointing wants every operation of the forward in the recomputation, in the same number; under
ZeRO-3 these gather other weights at other times. Here only what is kept must come in the same order.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
# A product over fewer columns is LoRA's way up: cheap to compute again, and as large as the layer's output to keep.
MIN_COLUMNS = 512
ATTENTION = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "torch_attn::_varlen_attn",
)


def checkpoint_arguments(selective: bool) -> dict[str, Any]:
    """Return the arguments of ``torch.utils.checkpoint`` for gradient checkpointing, whole or selective."""
    return {"use_reentrant": False, **({"context_fn": _contexts} if selective else {})}


def is_keeping() -> bool:
    """Return whether results are being kept or given back: they must not be changed in place then."""
    return _Selective.entered > 0


def _contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Return the contexts of a forward and of its recomputation."""
    kept: deque[Any] = deque()
    return _Keep(kept), _Reuse(kept)


def _is_kept(operation: Any, args: tuple[Any, ...]) -> bool:
    if operation in PRODUCTS:
        return bool(args[-2].shape[1] >= MIN_COLUMNS)
    return operation.name().startswith(ATTENTION)


class _Selective(TorchDispatchMode):
    """A context of selective checkpointing, over results that are kept in the order of the forward."""

    entered = 0

    def __init__(self, kept: deque[Any]) -> None:
        super().__init__()
        self.kept = kept

    def __enter__(self) -> Any:
        _Selective.entered += 1
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        _Selective.entered -= 1
        super().__exit__(*exception)


class _Keep(_Selective):
    """Keeps the results of the forward."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _is_kept(func, args):
            self.kept.append(result)
        return result


class _Reuse(_Selective):
    """Gives them back in the recomputation, one after the other."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_kept(func, args):
            return self.kept.popleft()
        return func(*args, **(kwargs or {}))
