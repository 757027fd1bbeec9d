"""Patch SwiGLU and rotary embeddings with liger-kernel's Triton kernels (the extra ``gpu``).

liger-kernel patches whole model classes; here only these two operations of one loaded model are, so that each can be
verified and taken out by itself.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

ACTIVATIONS = ("SiLU", "SiLUActivation")
PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")


def liger_obstacle() -> str | None:
    """Return why liger-kernel cannot be imported; ``None`` when it can."""
    missing = [name for name in ("triton", "liger_kernel") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed (pip install 'afina[gpu]')" if missing else None


def patch_swiglu(model: nn.Module) -> Callable[[], None] | None:
    """Patch the gated MLPs whose activation is SiLU; return what undoes it, ``None`` where there is none."""
    patched = [module for module in model.modules() if _is_swiglu(module)]
    for module in patched:
        module.forward = partial(_swiglu, module)

    def undo() -> None:
        for module in patched:
            del module.forward

    return undo if patched else None


def _is_swiglu(module: nn.Module) -> bool:
    has_parts = type(module).__name__.endswith("MLP") and all(hasattr(module, name) for name in PARTS)
    return has_parts and type(module.act_fn).__name__ in ACTIVATIONS


def _swiglu(module: Any, x: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    gated: Tensor = module.down_proj(LigerSiLUMulFunction.apply(module.gate_proj(x), module.up_proj(x)))
    return gated


def patch_rope(model: Any) -> Callable[[], None] | None:
    """Patch the rotary embedding in the module of the model's own code; return what undoes it, ``None`` where that
    has none."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    code: Any = sys.modules[type(base).__module__]
    stock = getattr(code, "apply_rotary_pos_emb", None)
    if stock is None:
        return None
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    code.apply_rotary_pos_emb = liger_rotary_pos_emb
    return partial(setattr, code, "apply_rotary_pos_emb", stock)
