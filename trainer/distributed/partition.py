"""Partition a model over the ranks for ZeRO-3, one tensor at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trainer.compat.deepspeed import partition_like
from trainer.distributed.process_group import World


def partition(model: nn.Module, ds_config: dict[str, Any], world: World, dtype: torch.dtype) -> None:
    """Partition a model over the ranks for ZeRO-3, one tensor after the other.

    DeepSpeed does it too, but puts the whole model on the device first, where a model that needs this stage has no
    room. Here a rank holds its shares and one whole tensor at a time. The weights that loading has left in their files
    are read by rank 0 alone, and the others receive them; quantised ones are on every rank's device already.

    Args:
        model: with its trainable parameters, on any device.
        ds_config: DeepSpeed's configuration.
        world: this process.
        dtype: of forward and backward; weights that are not quantised are cast to it.
    """
    import deepspeed

    first: Any = None
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter:
            wanted = dtype if parameter.is_floating_point() else parameter.dtype
            if world.is_main:  # a copy: a tensor that lies in its file must not be written to, nor keep the file open
                parameter.data = parameter.data.to(world.device, wanted, copy=True)
            else:
                parameter.data = torch.empty_like(parameter, device=world.device, dtype=wanted)
        if first is None:
            first = parameter
            deepspeed.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=ds_config, dtype=dtype)
        else:
            partition_like(first, parameter)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(world.device)
