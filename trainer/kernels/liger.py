"""Patch SwiGLU and rotary embeddings with liger-kernel's Triton kernels (the extra ``gpu``).

liger-kernel patches whole model classes; here only these two operations of one loaded model are, so that each can be
verified and taken out by itself.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from functools import partial
from typing import Any

from torch import Tensor, nn

from trainer.kernels.patch import Patch, patch_attribute, patch_forwards
from trainer.kernels.selective_checkpoint import is_keeping

ACTIVATIONS = ("SiLU", "SiLUActivation")
PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")


def liger_obstacle() -> str | None:
    """Return why liger-kernel cannot be imported; ``None`` when it can."""
    missing = [name for name in ("triton", "liger_kernel") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed (pip install 'afina[gpu]')" if missing else None


def patch_swiglu(model: nn.Module) -> Patch | None:
    """Patch the gated MLPs whose activation is SiLU; return the patch, applied, or ``None`` where there is none."""
    return patch_forwards([(module, partial(_swiglu, module)) for module in model.modules() if _is_swiglu(module)])


def _is_swiglu(module: nn.Module) -> bool:
    has_parts = type(module).__name__.endswith("MLP") and all(hasattr(module, name) for name in PARTS)
    return has_parts and type(module.act_fn).__name__ in ACTIVATIONS


def _swiglu(module: Any, x: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    gated: Tensor = module.down_proj(LigerSiLUMulFunction.apply(module.gate_proj(x), module.up_proj(x)))
    return gated


def patch_rope(model: Any) -> Patch | None:
    """Patch the rotary embedding in the module of the model's own code; return the patch, applied, or ``None`` where
    that has none."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    code: Any = sys.modules[type(base).__module__]
    if not hasattr(code, "apply_rotary_pos_emb"):
        return None
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    # It warns of each of its other implementations, for other devices, that cannot be imported.
    logging.getLogger("liger_kernel.backends.registry").setLevel(logging.ERROR)

    def rotate(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if is_keeping():  # it rotates in place, and they may be results that are kept
            q, k = q.clone(), k.clone()
        rotated: tuple[Tensor, Tensor] = liger_rotary_pos_emb(q, k, *args, **kwargs)
        return rotated

    return patch_attribute(code, "apply_rotary_pos_emb", rotate)
