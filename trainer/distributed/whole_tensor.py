"""A parameter as a whole tensor, also where ZeRO-3 has left a part of it on each rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def whole(parameter: nn.Parameter, modifier_rank: int | None = None) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters(
        [parameter], modifier_rank=modifier_rank, enabled=hasattr(parameter, "ds_id")
    )


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter, also where ZeRO-3 has left a part of it."""
    return torch.Size(getattr(parameter, "ds_shape", None) or parameter.shape)
