"""List, count and digest the trainable parameters of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from trainer.compat.bitsandbytes import is_4bit
from trainer.compat.deepspeed import whole_numel

LONE_ADAPTER = "default"  # PEFT's name of an adapter that was given none


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def trial_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Return the parameters of one of several adapters, by the names that they have in a model with that adapter alone
    (there it is PEFT's ``default``), in the model's order."""
    own = f".{name}."
    return {n.replace(own, f".{LONE_ADAPTER}."): p for n, p in model.named_parameters() if own in n}


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return a digest of each tensor's values, the same in any float dtype that holds them."""
    return {
        name: hashlib.blake2b(t.detach().float().cpu().contiguous().numpy().tobytes(), digest_size=16).hexdigest()
        for name, t in tensors.items()
    }


def is_whole_module(name: str) -> bool:
    """Return whether a parameter of this name is of a module that is trained whole (``method.modules_to_save``): as
    large as the base's own."""
    return ".modules_to_save." in name


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the number of trainable and of all parameters; a weight held in 4 bits counts as one, a ZeRO-3 partition
    as its whole."""
    trainable = total = 0
    for parameter in model.parameters():
        count = count_weights(parameter)
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def count_weights(parameter: Any) -> int:
    """Return the number of weights in a parameter, whatever it is stored in; of a ZeRO-3 partition, the whole's."""
    if is_4bit(parameter):
        return int(2 * parameter.numel() * parameter.element_size())  # two a byte, whatever the storage dtype is
    return whole_numel(parameter)
