"""Gather a parameter that ZeRO-3 has partitioned into a whole tensor."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn

from trainer.compat import deepspeed as compat


def whole(parameter: nn.Parameter, modifier_rank: int | None = None) -> AbstractContextManager[None]:
    """Gather a parameter on every rank for the time of a ``with`` block; one that is not partitioned is as it was.

    A collective under ZeRO-3.

    Args:
        parameter: partitioned or not.
        modifier_rank: the rank whose changes are kept and sent to the others; ``None`` keeps no change.
    """
    import deepspeed

    gathered: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(
        [parameter], modifier_rank=modifier_rank, enabled=compat.is_partitioned(parameter)
    )
    return gathered


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of a parameter, also where ZeRO-3 has left a share of it on each rank."""
    return torch.Size(compat.whole_shape(parameter))
