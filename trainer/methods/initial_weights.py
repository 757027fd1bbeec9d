"""Convert adapters that start from the base's own weights (PiSSA, Meng et al., 2024; OLoRA, Büyükakyüz, 2024).

They take ``scale · B₀·A₀`` out of the base when they are initialised. An adapter that is loaded on the base as it was
must give it back: ``B·A - B₀·A₀`` is an adapter of twice the rank, ``[B, -B₀]·[A; A₀]``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config.method import MethodConfig
from trainer.config.rules.method import changes_base


def copy_initial_weights(model: nn.Module, method: MethodConfig) -> dict[str, Tensor]:
    """Copy A and B as initialised to the CPU where their product was taken out of the base; else return nothing."""
    if not changes_base(method):
        return {}
    trainable_params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {
        n: p.detach().to("cpu", copy=True) for n, p in trainable_params.items() if ".lora_A." in n or ".lora_B." in n
    }


def convert_to_original_base(
    weights: dict[str, Tensor], initial_weights: dict[str, Tensor], config: Any
) -> dict[str, Tensor]:
    """Convert an adapter to one of the same function on the base as it was, before anything was taken out of it.

    Args:
        weights: trained tensors by name, A of (r, in), B of (out, r).
        initial_weights: the same as :func:`copy_initial_weights` gave them.
        config: a LoraConfig, whose rank, alpha and initialisation are changed with it.
    """
    factor = math.sqrt(2) if config.use_rslora else 2  # the scale stays: alpha / r, or alpha / sqrt(r)
    config.r, config.lora_alpha, config.init_lora_weights = 2 * config.r, config.lora_alpha * factor, True
    out = dict(weights)
    for name, initial in initial_weights.items():
        if ".lora_A." in name:
            out[name] = torch.cat([weights[name], initial.to(weights[name].dtype)])
        else:
            out[name] = torch.cat([weights[name], -initial.to(weights[name].dtype)], dim=1)
    return out
