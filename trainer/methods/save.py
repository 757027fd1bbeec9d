"""Trained weights on disk: stock PEFT adapters and plain Hugging Face folders, reopened before they are trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.errors import CheckpointError

ADAPTER_FILE = "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (folder / "adapter_config.json").exists()


def save_adapter(model: nn.Module, folder: Path, weights: dict[str, Tensor]) -> None:
    """Write a stock PEFT adapter and reopen it.

    Args:
        model: the PEFT model; its configuration is written.
        folder: made if it is not there.
        weights: whole tensors of every trained parameter by its name in ``model`` (gathered: under ZeRO-3 the model's
            own tensors are empty).

    Raises:
        CheckpointError: what was written does not read back as what was meant.
    """
    assert isinstance(model, PeftModel)
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    model.save_pretrained(str(folder), state_dict=contiguous, save_embedding_layers=False)
    expected = get_peft_model_state_dict(model, state_dict=contiguous, save_embedding_layers=False)
    verify_adapter(folder, expected)


def verify_adapter(folder: Path, expected: dict[str, Tensor]) -> None:
    """Reopen an adapter and compare it, to the bit.

    Raises:
        CheckpointError: a tensor is missing, has another shape or value, or is not finite.
    """
    found = _load(folder / ADAPTER_FILE)
    if set(found) != set(expected):
        odd = sorted(set(found) ^ set(expected))[:3]
        raise CheckpointError(str(folder), rule=f"was written with other tensors than meant ({', '.join(odd)} …)")
    for name, tensor in expected.items():
        if not torch.isfinite(tensor).all():  # first, for NaN is not equal to itself
            raise CheckpointError(f"{folder} {name}", rule="holds values that are not finite")
        if found[name].shape != tensor.shape or not torch.equal(found[name], tensor):
            raise CheckpointError(
                f"{folder} {name}", rule="does not read back as it was written", cure="check the disk"
            )


def has_learnt(folder: Path) -> bool:
    """Whether any LoRA B of an adapter has left its start at zero."""
    return any(bool(t.any()) for name, t in _load(folder / ADAPTER_FILE).items() if "lora_B" in name)


def load_adapter(base: nn.Module, folder: Path) -> nn.Module:
    """The base model with a saved adapter on it, for inference; its tensors take the base's dtype.

    Raises:
        CheckpointError: the adapter cannot be read or does not fit the base.
    """
    if not is_adapter(folder):
        raise CheckpointError(str(folder), rule="holds no adapter_config.json", cure="name a run's folder")
    saved = _load(folder / ADAPTER_FILE)
    try:
        model = PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False)
    except (RuntimeError, ValueError, KeyError) as error:
        raise _does_not_fit(folder, str(error).splitlines()[0]) from error
    # PEFT fills what is missing with untrained adapters and passes over what has no place.
    odd = sorted(set(saved) ^ set(get_peft_model_state_dict(model, save_embedding_layers=False)))
    if odd:
        raise _does_not_fit(folder, f"{len(odd)} tensors of one are not in the other, {odd[0]} among them")
    return model


def _does_not_fit(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(str(folder), rule=f"does not fit the base model ({reason})", cure="use its own base")


def save_full(model: Any, folder: Path, weights: dict[str, Tensor]) -> None:
    """Write a plain Hugging Face model folder and reopen it.

    Args:
        model: the causal LM; its configuration is written.
        folder: made if it is not there.
        weights: whole tensors of the state dict (rank 0's gathered copy); tied weights once or twice, as gathered.

    Raises:
        CheckpointError: what was written does not read back as what was meant.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(folder), state_dict={k: v.detach().cpu().contiguous() for k, v in weights.items()})
    found: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        found.update(_load(shard))
    for name, tensor in weights.items():
        if name in found and (found[name].shape != tensor.shape or not torch.equal(found[name], tensor.detach().cpu())):
            raise CheckpointError(
                f"{folder} {name}", rule="does not read back as it was written", cure="check the disk"
            )
    if not found:
        raise CheckpointError(str(folder), rule="holds no weights after saving")


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(str(file))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(str(file), rule=f"cannot be read ({error})", cure="use an older checkpoint") from error
