"""Save trained weights as stock PEFT adapters or plain Hugging Face folders, and verify them by reopening."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from trainer.compat.peft import prompt_parameters
from trainer.errors import CheckpointError
from trainer.methods.attach import is_prompt_learning
from trainer.methods.base_record import BaseRecord, write_base
from trainer.methods.bottleneck import save_bottleneck
from trainer.methods.initial_weights import convert_to_original_base
from trainer.methods.load import ADAPTER_FILE, read_tensors
from trainer.methods.parameters import LONE_ADAPTER


def save_adapter(
    model: nn.Module,
    folder: Path,
    weights: dict[str, Tensor],
    initial_weights: dict[str, Tensor] | None = None,
    base: BaseRecord | None = None,
    adapter_name: str = LONE_ADAPTER,
) -> None:
    """Write an adapter and reopen it: in stock PEFT's form, or in bottleneck's own.

    Args:
        model: with its adapters attached; under ZeRO-3 its own tensors are empty and are not looked at.
        folder: made if it is not there.
        weights: whole tensors of every trainable parameter by its name in ``model``.
        initial_weights: what ``initial_weights.copy_initial_weights`` gave: the adapter is written for the base as it
            was.
        base: which model it belongs to; written beside it, and PEFT is told where that is. ``None``: PEFT is told where
            it was loaded from.
        adapter_name: PEFT's, of the one that is written where ``model`` has several; the names in ``weights`` are those
            of a model with that adapter alone.

    Raises:
        CheckpointError: what was written does not read back as what was meant.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if base is not None:
        write_base(folder, base)
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    if not isinstance(model, PeftModel):
        save_bottleneck(model, folder, whole, None if base is None else base.stock_name)
        return verify_adapter(folder, whole)
    config = copy.copy(model.peft_config[adapter_name])
    config.inference_mode = True
    config.base_model_name_or_path = model.get_base_model().config.name_or_path if base is None else base.stock_name
    config.revision = None if base is None else base.revision
    if is_prompt_learning(model):
        expected = {"prompt_embeddings": prompt_embeddings(whole)}
    else:
        if initial_weights:
            whole = convert_to_original_base(whole, initial_weights, config)
        whole = _with_tied(model, whole)
        own = {_with_adapter_name(name, adapter_name): tensor for name, tensor in whole.items()}
        expected = get_peft_model_state_dict(model, own, adapter_name, save_embedding_layers=False)
        if config.peft_type == "ADALORA":
            config.rank_pattern = model.peft_config[adapter_name].rank_pattern
    save_file({n: t.contiguous() for n, t in expected.items()}, str(folder / ADAPTER_FILE), metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    return verify_adapter(folder, expected)


def _with_tied(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the second names of parameters that stand in two modules (tied ones): PEFT saves them under both."""
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if first in weights and name not in weights:
            weights = {**weights, name: weights[first].clone()}
    return weights


def _with_adapter_name(name: str, adapter_name: str) -> str:
    return name.replace(f".{LONE_ADAPTER}.", f".{adapter_name}.")


def prompt_embeddings(weights: dict[str, Tensor]) -> Tensor:
    """Return the embeddings that prompt or prefix tuning has trained, (virtual tokens, width): the MLP of a projected
    prefix is applied and dropped.
    """
    part = prompt_parameters(weights)
    embedding = part["embedding.weight"]
    if "transform.0.weight" not in part:
        return embedding
    inner = nn.functional.linear(embedding, part["transform.0.weight"], part["transform.0.bias"])
    out = nn.functional.linear(inner.tanh(), part["transform.2.weight"], part["transform.2.bias"])
    return out.contiguous()


def verify_adapter(folder: Path, expected: dict[str, Tensor]) -> None:
    """Reopen an adapter and compare it, to the bit.

    Raises:
        CheckpointError: a tensor is missing, has another shape or value, or is not finite.
    """
    found = read_tensors(folder / ADAPTER_FILE)
    if set(found) != set(expected):
        odd = sorted(set(found) ^ set(expected))[:3]
        raise CheckpointError(str(folder), reason=f"was written with other tensors than meant ({', '.join(odd)} …)")
    for name, tensor in expected.items():
        if not torch.isfinite(tensor).all():  # first, for NaN is not equal to itself
            raise CheckpointError(f"{folder} {name}", reason="holds values that are not finite")
        if found[name].shape != tensor.shape or not torch.equal(found[name], tensor):
            raise CheckpointError(
                f"{folder} {name}", reason="does not read back as it was written", hint="check the disk"
            )


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
        found.update(read_tensors(shard))
    for name, tensor in weights.items():
        if name in found and (found[name].shape != tensor.shape or not torch.equal(found[name], tensor.detach().cpu())):
            raise CheckpointError(
                f"{folder} {name}", reason="does not read back as it was written", hint="check the disk"
            )
    if not found:
        raise CheckpointError(str(folder), reason="holds no weights after saving")
