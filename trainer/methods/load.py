"""Read saved adapters, and load them onto a base model for inference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.errors import CheckpointError, ConfigError
from trainer.files import parse_json
from trainer.methods.base_record import base_name
from trainer.methods.bottleneck import BOTTLENECK_TYPE, attach_bottleneck, parse_bottleneck_config
from trainer.methods.parameters import trainable_parameters

ADAPTER_FILE = "adapter_model.safetensors"
MAX_REASON = 400  # characters of a library's own words
MAX_CONFIG_BYTES = 10_000_000  # a rank and an alpha pattern for each of thousands of layers are below
# What PEFT allocates by, as an adapter_config.json names it.
SIZES = ("r", "init_r", "num_virtual_tokens", "encoder_hidden_size", "token_dim", "bottleneck_size")
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds a PEFT adapter."""
    return (folder / "adapter_config.json").exists()


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read the tensors of one safetensors file, on the CPU.

    Raises:
        CheckpointError: it cannot be read, or holds values that are not finite.
    """
    try:
        tensors = load_file(str(file))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(str(file), reason=f"cannot be read ({error})", hint="use an older checkpoint") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            reason = f"{name} holds values that are not finite, and would answer with nothing"
            raise CheckpointError(str(file), reason=reason, hint="use an older checkpoint")
    return tensors


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read the metadata that an adapter was saved with, its adapter_config.json.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    if not is_adapter(folder):
        raise CheckpointError(str(folder), reason="holds no adapter_config.json", hint="name a run's folder")
    file = folder / "adapter_config.json"
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"of more than {MAX_CONFIG_BYTES} bytes")
        metadata = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(str(file), reason=f"cannot be read ({error})", hint="use an older checkpoint") from error
    if not isinstance(metadata, dict) or "peft_type" not in metadata:
        raise CheckpointError(str(file), reason="names no peft_type, so it is no adapter's", hint="name a run's folder")
    return metadata


def find_base_changing_init(metadata: dict[str, Any]) -> str:
    """Return the initialisation of a saved LoRA that changed the base's weights and was not converted when saved; else
    an empty string. Stock PEFT makes the change again on any base that it is loaded on."""
    init = metadata.get("init_lora_weights")
    return init if isinstance(init, str) and init.startswith(BASE_CHANGING_INITS) else ""


def load_adapter(base: nn.Module, folder: Path) -> nn.Module:
    """Load a saved adapter onto the base model, for inference; its tensors take the base's dtype.

    Raises:
        CheckpointError: the adapter cannot be read or does not fit the base.
    """
    metadata = read_adapter_config(folder)
    saved = read_tensors(folder / ADAPTER_FILE)
    _check_sizes(base, folder, metadata, saved)
    if metadata["peft_type"] == BOTTLENECK_TYPE:
        return _load_bottleneck(base, folder, metadata, saved)
    try:
        model = PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False)
    except Exception as error:  # whatever PEFT makes of a file that is anybody's
        raise _does_not_fit(folder, metadata, base, _why(error)) from error
    # PEFT fills what is missing with untrained adapters and passes over what has no place.
    odd = sorted(set(saved) ^ set(get_peft_model_state_dict(model, save_embedding_layers=False)))
    if odd:
        raise _does_not_fit(
            folder, metadata, base, f"{len(odd)} tensors of one are not in the other, {odd[0]} among them"
        )
    return model


def _check_sizes(base: nn.Module, folder: Path, metadata: dict[str, Any], saved: dict[str, Tensor]) -> None:
    """Refuse sizes that no saved tensor has, before anything is allocated for them: the base is in memory by now."""
    if metadata.get("megatron_config"):
        raise _does_not_fit(folder, metadata, base, "megatron_core names a module that PEFT would import")
    largest = max((size for tensor in saved.values() for size in tensor.shape), default=0)
    named = {name: metadata.get(name) for name in SIZES}
    patterns = metadata.get("rank_pattern")
    if isinstance(patterns, dict):
        named |= {f"rank_pattern.{name}": rank for name, rank in patterns.items()}
    for name, size in named.items():
        if isinstance(size, (int, float)) and not isinstance(size, bool) and size > largest:
            reason = f"{name} is {size}, and no saved tensor has a size above {largest}"
            raise _does_not_fit(folder, metadata, base, reason)


def _load_bottleneck(base: nn.Module, folder: Path, metadata: dict[str, Any], saved: dict[str, Tensor]) -> nn.Module:
    try:
        model = attach_bottleneck(base, parse_bottleneck_config(metadata))
        own = trainable_parameters(model)
        if odd := sorted(set(saved) ^ set(own)):
            reason = f"{len(odd)} tensors of one are not in the other, {odd[0]} among them"
            raise _does_not_fit(folder, metadata, base, reason)
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(saved[name])
    except (RuntimeError, KeyError, ConfigError) as error:
        raise _does_not_fit(folder, metadata, base, _why(error)) from error
    return model.requires_grad_(False)


def _why(error: BaseException) -> str:
    """Return what is wrong in one line: torch says it in the second one, and once more for each tensor."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if not lines[0].endswith(":") or len(lines) == 1:
        return lines[0][:MAX_REASON]
    rest = f"; and {len(lines) - 2} more of the kind" if len(lines) > 2 else ""
    return f"{lines[1].rstrip('.')[:MAX_REASON]}{rest}"


def _does_not_fit(folder: Path, metadata: dict[str, Any], base: Any, why: str) -> CheckpointError:
    trained_on = base_name(folder, metadata)
    here = getattr(getattr(base, "config", None), "name_or_path", "") or type(base).__name__
    reason = f"does not fit the base model {here}: it was trained on {trained_on} ({why})"
    return CheckpointError(str(folder), reason=reason, hint=f"use its own base: model.name_or_path={trained_on}")
