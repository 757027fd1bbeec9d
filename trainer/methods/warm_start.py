"""Warm start a run from a saved adapter: its tensors in place of the fresh ones, if they mean the same."""

from __future__ import annotations

import re
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from trainer.config.messages import as_typed, config_error, in_grammar
from trainer.config.method import METHODS, MethodConfig
from trainer.errors import ConfigError
from trainer.files import parse_json
from trainer.methods.base_record import base_name
from trainer.methods.bottleneck import BOTTLENECK_TYPE, bottleneck_metadata
from trainer.methods.load import ADAPTER_FILE, find_base_changing_init, read_adapter_config, read_tensors
from trainer.methods.parameters import trainable_parameters
from trainer.methods.target_parameters import adapted_parameters
from trainer.methods.token_embeddings import trained_ids

METHOD_NAMES = {
    "LORA": "lora",
    "ADALORA": "adalora",
    "IA3": "ia3",
    "PROMPT_TUNING": "prompt",
    "PREFIX_TUNING": "prefix",
    BOTTLENECK_TYPE: "bottleneck",
}
# Settings that change what tensors of one name and shape mean: the saved key, and ours. The rank comes first, since
# alpha follows from it when it is not given.
SETTINGS: dict[str, dict[str, str]] = {
    "lora": {
        "use_dora": "dora",
        "use_rslora": "rslora",
        "r": "r",
        "lora_alpha": "alpha",
        "bias": "bias",
        "rank_pattern": "rank_pattern",
        "alpha_pattern": "alpha_pattern",
        "modules_to_save": "modules_to_save",
    },
    "adalora": {"init_r": "init_r", "lora_alpha": "alpha"},
    "ia3": {},
    "prompt": {"num_virtual_tokens": "virtual_tokens"},
    "prefix": {"num_virtual_tokens": "virtual_tokens"},
    "bottleneck": {name: name for name in ("placement", "reduction_factor", "activation", "layers")},
}
PREFIX = "base_model.model."


def warm_start(model: Any, method: MethodConfig, folder: Path) -> None:
    """Copy a saved adapter's values into the trainable parameters.

    Args:
        model: with fresh adapters attached, whole on this rank.
        method: the ``method`` group that they were attached by.
        folder: of the adapter.

    Raises:
        ConfigError: the adapter is of another method, shape, scale or base.
        CheckpointError: it cannot be read.
    """
    metadata = read_adapter_config(folder)
    is_bottleneck = method.name == "bottleneck"  # the one kind that PEFT does not have
    _check_method(metadata, method, folder)
    _check_settings(
        metadata,
        bottleneck_metadata(model) if is_bottleneck else model.peft_config["default"].to_dict(),
        method,
        folder,
    )
    _check_parameters(model, metadata, method, folder)
    if method.name == "lora":
        _check_tokens(metadata, model.peft_config["default"].to_dict(), method, folder)
    saved = read_tensors(folder / ADAPTER_FILE)
    if is_bottleneck:
        own = trainable_parameters(model)
    else:
        own = get_peft_model_state_dict(model, save_embedding_layers=False)
    if method.name == "adalora" and metadata.get("rank_pattern"):
        saved = _restore_pruned_ranks(saved, metadata["rank_pattern"], own)
    of_parameters = {name.partition(".")[0] for name in adapted_parameters(model).values()} | {"base_layer"}
    _check_shapes(saved, own, metadata, folder, of_parameters)
    assert not any(tensor.is_meta for tensor in own.values()), "adapters without values cannot be given any"
    if is_bottleneck:
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(saved[name])
    else:
        set_peft_model_state_dict(model, saved)


def _check_method(metadata: dict[str, Any], method: MethodConfig, folder: Path) -> None:
    kind = metadata["peft_type"]
    name = METHOD_NAMES.get(kind)
    if name is None:
        hint = f"an adapter of {METHODS[method.name].title}"
        raise _cannot_start(folder, f"is of a kind that is not trained here ({kind})", hint)
    if name != method.name:
        reason = f"is of {METHODS[name].title}, and this run trains {METHODS[method.name].title}"
        raise _cannot_start(folder, reason, f"method={name}")
    if init := find_base_changing_init(metadata):
        reason = f"starts in the base's own weights ({init}): on the base as it is, it means something else"
        raise _cannot_start(folder, reason, "an adapter that was converted when it was saved (afina's are)")


def _check_settings(metadata: dict[str, Any], own: dict[str, Any], method: MethodConfig, folder: Path) -> None:
    for theirs, ours in SETTINGS[method.name].items():
        was, now = metadata.get(theirs) or None, own.get(theirs) or None  # an adapter of an older PEFT lacks the newest
        if was == now:
            continue
        hint = as_typed(f"method.{ours}", metadata.get(theirs))
        if theirs in ("r", "init_r"):
            hint += f" {as_typed('method.alpha', metadata.get('lora_alpha'))}"
        reason = f"the adapter to start from ({folder}) has {in_grammar(metadata.get(theirs))}"
        raise config_error(f"method.{ours}", own.get(theirs), reason, hint)


def _check_parameters(model: Any, metadata: dict[str, Any], method: MethodConfig, folder: Path) -> None:
    """Refuse an adapter of other parameters, which its tensors do not name: the ends of names are compared."""
    ends = sorted(metadata.get("target_parameters") or []) or None
    was = {end.rpartition(".")[2] for end in ends or []}
    now = {name.rpartition(".")[2] for name in adapted_parameters(model).values()}
    if was != now:
        reason = f"the adapter to start from ({folder}) has {in_grammar(ends)}"
        raise config_error(
            "method.target_parameters", method.target_parameters, reason, as_typed("method.target_parameters", ends)
        )


def _check_tokens(metadata: dict[str, Any], own: dict[str, Any], method: MethodConfig, folder: Path) -> None:
    """Refuse an adapter that has trained the embeddings of other tokens, or of none."""
    was, now = (trained_ids(found.get("trainable_token_indices")) for found in (metadata, own))
    if was == now:
        return
    reason = f"the adapter to start from ({folder}) has trained the embeddings of {len(was)} tokens, ids {was}"
    hint = "model.new_tokens and method.trainable_tokens as it was trained with"
    raise config_error(
        "method.trainable_tokens",
        method.trainable_tokens,
        f"{reason if was else f'{folder} has none'}; this run's: {now}",
        hint if was else "method.trainable_tokens=null, or train the tokens with the adapter from its start",
    )


def check_same_tokens(tokenizer: Any, ids: list[int], folder: Path) -> None:
    """Refuse an adapter whose trained tokens have the ids of this run's, and are other tokens: a word would start as
    another one.

    Args:
        tokenizer: of this run.
        ids: of the tokens that it trains.
        folder: of the adapter, in which a tokenizer may lie.

    Raises:
        ConfigError: an id stands for another token there.
    """
    try:
        added = parse_json((folder / "tokenizer.json").read_bytes())["added_tokens"]
        theirs = {int(entry["id"]): str(entry["content"]) for entry in added}
    except (OSError, ValueError, KeyError, TypeError):
        return
    for number in ids:
        own = tokenizer.convert_ids_to_tokens(number)
        if (other := theirs.get(number, own)) != own:
            reason = f"has trained {other!r} as token {number}, which is {own!r} in this run"
            raise _cannot_start(folder, reason, "its own model.new_tokens, in its order")


def _restore_pruned_ranks(
    saved: dict[str, Tensor], pattern: dict[str, list[bool]], fresh: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return AdaLoRA's tensors with the pruned ranks in them: fresh ones, whose E is zero, so they add nothing."""
    out = dict(saved)
    for name, kept in pattern.items():
        module = PREFIX + name.partition(".lora_E")[0]
        ranks = torch.tensor(kept)
        for part in "ABE":
            key = f"{module}.lora_{part}"
            if key not in fresh or key not in saved or len(fresh[key].T if part == "B" else fresh[key]) != len(ranks):
                continue  # found by the comparison of names and shapes
            whole, values = fresh[key].detach().clone(), saved[key].to(fresh[key])
            if part == "B":
                whole[:, ranks] = values
            else:
                whole[ranks] = values
            out[key] = whole
    return out


def _check_shapes(
    saved: dict[str, Tensor],
    own: dict[str, Tensor],
    metadata: dict[str, Any],
    folder: Path,
    of_parameters: Set[str],
) -> None:
    """Compare the tensors; ``of_parameters``: last names of modules that are no target, but their parameters are."""
    modules, own_modules = _modules(saved), _modules(own)
    if modules != own_modules:
        kinds, own_kinds = (
            {name.rpartition(".")[2] for name in names} - of_parameters for names in (modules, own_modules)
        )
        if kinds != own_kinds:
            listed = ",".join(sorted(kinds))
            reason = f"the adapter to start from ({folder}) is on {listed.replace(',', ', ')}"
            hint = as_typed("method.target_modules", sorted(kinds))
            raise config_error("method.target_modules", sorted(own_kinds), reason, hint)
        layers, own_layers = _layer_numbers(modules), _layer_numbers(own_modules)
        reason = f"the adapter to start from ({folder}, of {base_name(folder, metadata)}) is in others: {layers}"
        raise config_error("method.layers", own_layers, reason, "its layers and its own base")
    if differing := sorted(set(saved) ^ set(own)):
        raise _cannot_start(
            folder, f"has other tensors than this run, {differing[0]} among them", "its own method and base"
        )
    for name, tensor in own.items():
        if saved[name].shape != tensor.shape:
            reason = f"has {name} of shape {tuple(saved[name].shape)}, and this run needs {tuple(tensor.shape)}"
            raise _cannot_start(folder, reason, f"its own base, {base_name(folder, metadata)}")


def _modules(tensors: dict[str, Tensor]) -> set[str]:
    """Return the full names of the modules that hold adapters; none for prompt kinds. A module that takes another's
    place (bottleneck) has that one's name."""
    return {re.split(r"\.(?:lora_|ia3_l$|down\.|up\.)", name)[0] for name in tensors if "." in name}


def _layer_numbers(modules: set[str]) -> list[int]:
    return sorted({int(part) for name in modules for part in name.split(".") if part.isdigit()})


def _cannot_start(folder: Path, reason: str, hint: str) -> ConfigError:
    return config_error("method.adapter", folder, reason, hint)
