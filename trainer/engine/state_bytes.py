"""Compute the memory that weights, gradients and optimizer take on a device, before a step is paid for."""

from __future__ import annotations

import math

import torch
from torch import nn

from trainer.compat.deepspeed import whole_shape
from trainer.config.optimizers import OPTIMIZERS
from trainer.config.schema import TrainConfig
from trainer.engine.optimizers import is_matrix, token_tables
from trainer.engine.quantised_moments import BLOCK

MASTER = 4  # bytes a trained value of DeepSpeed's copy; under stage 0 the trained weights are the fp32 copy
MOMENT = 4  # bytes a value
UNQUANTISED = 4096  # values of a tensor below which bitsandbytes keeps its moments in fp32


def state_bytes(
    model: nn.Module, config: TrainConfig, dtype: torch.dtype, world_size: int, reduces_once: bool = True
) -> int:
    """Return the bytes on one device, without activations and buffers (Rajbhandari et al., 2020, section 3).

    Args:
        model: before DeepSpeed has it, on whatever device.
        config: what is split over the ranks, what waits on the host, and the optimizer.
        dtype: of gradients.
        world_size: ranks.
        reduces_once: a whole gradient is kept on every rank until the step's end, as adapters' are.
    """
    zero, stage = config.zero, config.zero.stage
    weights = trained = 0
    for parameter in model.parameters():
        count = math.prod(whole_shape(parameter))
        weights += count * (4 if stage == 0 and parameter.requires_grad else parameter.element_size())
        trained += count if parameter.requires_grad else 0
    weights = 0 if zero.offload_params != "none" else weights // (world_size if stage == 3 else 1)
    size = 4 if stage == 0 else dtype.itemsize
    gradients = trained * size // (world_size if stage >= 2 and not reduces_once else 1)
    held = optimizer_bytes(model, config.optim.name, flattened=stage > 0)
    optimizer = held if stage == 0 else (MASTER * trained + held) // world_size
    return weights + gradients + (0 if zero.offload_optimizer != "none" else optimizer)


def optimizer_bytes(model: nn.Module, name: str, flattened: bool) -> int:
    """Return the bytes that an optimizer holds of all trained tensors, beside masters; pages count as held.

    Args:
        model: with its trainable parameters.
        name: ``optim.name``.
        flattened: ZeRO has laid the tensors end to end.
    """
    tables = {id(table) for table in token_tables(model)} if name == "muon" else set()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if flattened and OPTIMIZERS[name].quantises:
        return _quantised(sum(math.prod(whole_shape(parameter)) for parameter in trained))
    total = 0
    for parameter in trained:
        shape = whole_shape(parameter)
        count = math.prod(shape)
        if OPTIMIZERS[name].quantises:
            total += _quantised(count)
        elif name == "adafactor" and len(shape) > 1:
            total += MOMENT * (count // shape[-1] + count // shape[-2])
        elif name in ("adafactor", "lion") or (name == "muon" and is_matrix(parameter) and id(parameter) not in tables):
            total += MOMENT * count
        else:
            total += 2 * MOMENT * count
    return total


def _quantised(count: int) -> int:
    """Return the bytes of two moments of so many values in a row: codes, and a scale a block."""
    return 2 * MOMENT * count if count < UNQUANTISED else 2 * (count + MOMENT * math.ceil(count / BLOCK))
