"""Saved adapters: read, and put on a base model for inference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.errors import CheckpointError, ConfigError
from trainer.methods.bottleneck import KIND, attach_bottleneck, parse_bottleneck_config
from trainer.methods.parameters import trainable_parameters

ADAPTER_FILE = "adapter_model.safetensors"
CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (folder / "adapter_config.json").exists()


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, on the CPU.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return load_file(str(file))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(str(file), reason=f"cannot be read ({error})", hint="use an older checkpoint") from error


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The configuration that an adapter was saved with.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    if not is_adapter(folder):
        raise CheckpointError(str(folder), reason="holds no adapter_config.json", hint="name a run's folder")
    file = folder / "adapter_config.json"
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(str(file), reason=f"cannot be read ({error})", hint="use an older checkpoint") from error
    if not isinstance(facts, dict) or "peft_type" not in facts:
        raise CheckpointError(str(file), reason="names no peft_type, so it is no adapter's", hint="name a run's folder")
    return facts


def base_weight_init(facts: dict[str, Any]) -> str:
    """The start of a saved LoRA that has changed the base's weights and was not converted when it was saved; else
    nothing. Stock PEFT makes the change again on any base that it is loaded on."""
    start = facts.get("init_lora_weights")
    return start if isinstance(start, str) and start.startswith(CHANGING_STARTS) else ""


def load_adapter(base: nn.Module, folder: Path) -> nn.Module:
    """The base model with a saved adapter on it, for inference; its tensors take the base's dtype.

    Raises:
        CheckpointError: the adapter cannot be read or does not fit the base.
    """
    facts = read_adapter_config(folder)
    saved = read_tensors(folder / ADAPTER_FILE)
    if facts["peft_type"] == KIND:
        return _load_bottleneck(base, folder, facts, saved)
    try:
        model = PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False)
    except (RuntimeError, ValueError, KeyError) as error:
        raise _does_not_fit(folder, str(error).splitlines()[0]) from error
    # PEFT fills what is missing with untrained adapters and passes over what has no place.
    odd = sorted(set(saved) ^ set(get_peft_model_state_dict(model, save_embedding_layers=False)))
    if odd:
        raise _does_not_fit(folder, f"{len(odd)} tensors of one are not in the other, {odd[0]} among them")
    return model


def _load_bottleneck(base: nn.Module, folder: Path, facts: dict[str, Any], saved: dict[str, Tensor]) -> nn.Module:
    try:
        model = attach_bottleneck(base, parse_bottleneck_config(facts))
        mine = trainable_parameters(model)
        if odd := sorted(set(saved) ^ set(mine)):
            raise _does_not_fit(folder, f"{len(odd)} tensors of one are not in the other, {odd[0]} among them")
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(saved[name])
    except (RuntimeError, KeyError, ConfigError) as error:
        raise _does_not_fit(folder, str(error).splitlines()[0]) from error
    return model.requires_grad_(False)


def _does_not_fit(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(str(folder), reason=f"does not fit the base model ({reason})", hint="use its own base")
