"""Put the trained parameters on a model."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from trainer.config.schema import MethodConfig
from trainer.methods.targets import target_names


def attach(model: nn.Module, method: MethodConfig, seed: int) -> nn.Module:
    """Freeze what is not trained and add what is.

    Args:
        model: the base model.
        method: the ``method`` group, checked.
        seed: the adapters' start is drawn from it, the same on every rank.

    Returns:
        The model itself (full), or stock PEFT's wrapper of it (lora). Adapters have the dtype of the base: their fp32
        copies are the optimizer's.
    """
    if method.name == "full":
        return model.requires_grad_(True)
    torch.manual_seed(seed)
    return get_peft_model(model, lora_config(model, method), autocast_adapter_dtype=False)


def lora_config(model: nn.Module, method: MethodConfig) -> LoraConfig:
    """Stock PEFT's configuration of LoRA (Hu et al., 2021); alpha null means 2·r."""
    assert method.r is not None, "rules.py lets no lora without a rank through"
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=method.r,
        lora_alpha=2 * method.r if method.alpha is None else method.alpha,
        lora_dropout=method.dropout,
        target_modules=target_names(model, method.target_modules),
    )


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trained and total parameters; a weight held in 4 bits counts as one, a ZeRO-3 partition as its whole."""
    trained = total = 0
    for parameter in model.parameters():
        count = _numel(parameter)
        total += count
        trained += count if parameter.requires_grad else 0
    return trained, total


def _numel(parameter: Any) -> int:
    if type(parameter).__name__ == "Params4bit":
        return 2 * parameter.numel() * parameter.element_size()  # two weights a byte, whatever the storage dtype is
    return int(getattr(parameter, "ds_numel", 0) or parameter.numel())
