"""Compute the memory that weights, gradients and optimizer take on a device, before a step is paid for."""

from __future__ import annotations

import math

import torch
from torch import nn

from trainer.compat.deepspeed import whole_shape
from trainer.config.schema import ZeroConfig

MASTER_AND_MOMENTS = 12  # bytes a trained value: AdamW's two moments and DeepSpeed's copy, all fp32
MOMENTS = 8  # under stage 0, where the trained weights are the fp32 copy


def state_bytes(
    model: nn.Module, zero: ZeroConfig, dtype: torch.dtype, world_size: int, reduces_once: bool = True
) -> int:
    """Return the bytes on one device, without activations and buffers (Rajbhandari et al., 2020, section 3).

    Args:
        model: before DeepSpeed has it, on whatever device.
        zero: what is split over the ranks, and what waits on the host.
        dtype: of gradients.
        world_size: ranks.
        reduces_once: a whole gradient is kept on every rank until the step's end, as adapters' are.
    """
    stage = zero.stage
    weights = trained = 0
    for parameter in model.parameters():
        count = math.prod(whole_shape(parameter))
        weights += count * (4 if stage == 0 and parameter.requires_grad else parameter.element_size())
        trained += count if parameter.requires_grad else 0
    weights = 0 if zero.offload_params != "none" else weights // (world_size if stage == 3 else 1)
    size = 4 if stage == 0 else dtype.itemsize
    gradients = trained * size // (world_size if stage >= 2 and not reduces_once else 1)
    optimizer = trained * (MOMENTS if stage == 0 else MASTER_AND_MOMENTS) // (world_size if stage else 1)
    return weights + gradients + (0 if zero.offload_optimizer != "none" else optimizer)
