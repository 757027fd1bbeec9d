"""Checkpoint activations selectively: results of large matrix products are kept, everything else is computed again.

The products are nearly all of a layer's arithmetic and a part of its activations only (Korthikanti et al., 2022, and
torch's selective activation checkpointing). Results of fused attention are kept too: they are as large as one
projection's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

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
    arguments: dict[str, Any] = {"use_reentrant": False}
    if selective:
        arguments["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    return arguments


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep this operation's result, or compute it again in the backward."""
    if op in PRODUCTS and args[-2].shape[1] >= MIN_COLUMNS:
        return CheckpointPolicy.MUST_SAVE
    if getattr(op, "name", str)().startswith(ATTENTION):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
