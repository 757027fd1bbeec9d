"""A run that goes on from a saved adapter: its trained tensors in place of the fresh start, if they mean the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from trainer.config.messages import config_error
from trainer.config.method import METHODS, MethodConfig
from trainer.errors import ConfigError
from trainer.methods.bottleneck import KIND, bottleneck_metadata
from trainer.methods.load import ADAPTER_FILE, base_weight_init, read_adapter_config, read_tensors
from trainer.methods.parameters import trainable_parameters

NAMES = {
    "LORA": "lora",
    "ADALORA": "adalora",
    "IA3": "ia3",
    "PROMPT_TUNING": "prompt",
    "PREFIX_TUNING": "prefix",
    KIND: "bottleneck",
}
# What tensors of one name and shape may still mean: the saved key, and ours. The rank comes first, since alpha follows
# from it when it is not given.
MEANING: dict[str, dict[str, str]] = {
    "lora": {
        "use_dora": "dora",
        "use_rslora": "rslora",
        "r": "r",
        "lora_alpha": "alpha",
        "bias": "bias",
        "rank_pattern": "rank_pattern",
        "alpha_pattern": "alpha_pattern",
    },
    "adalora": {"init_r": "init_r", "lora_alpha": "alpha"},
    "ia3": {},
    "prompt": {"num_virtual_tokens": "virtual_tokens"},
    "prefix": {"num_virtual_tokens": "virtual_tokens"},
    "bottleneck": {name: name for name in ("placement", "reduction_factor", "activation", "layers")},
}
PREFIX = "base_model.model."


def warm_start(model: Any, method: MethodConfig, folder: Path) -> None:
    """Give the trained tensors the values of a saved adapter.

    Args:
        model: with fresh adapters attached, whole on this rank.
        method: the ``method`` group that they were attached by.
        folder: of the adapter.

    Raises:
        ConfigError: the adapter is of another method, shape, scale or base.
        CheckpointError: it cannot be read.
    """
    facts = read_adapter_config(folder)
    is_own = method.name == "bottleneck"  # the one kind that PEFT does not have
    _same_method(facts, method, folder)
    _same_meaning(
        facts, bottleneck_metadata(model) if is_own else model.peft_config["default"].to_dict(), method, folder
    )
    saved = read_tensors(folder / ADAPTER_FILE)
    if is_own:
        mine = trainable_parameters(model)
    else:
        mine = get_peft_model_state_dict(model, save_embedding_layers=False)
    if method.name == "adalora" and facts.get("rank_pattern"):
        saved = _with_taken_ranks(saved, facts["rank_pattern"], mine)
    _same_shapes(saved, mine, facts, folder)
    assert not any(tensor.is_meta for tensor in mine.values()), "adapters without values cannot be given any"
    if is_own:
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(saved[name])
    else:
        set_peft_model_state_dict(model, saved)


def _same_method(facts: dict[str, Any], method: MethodConfig, folder: Path) -> None:
    kind = facts["peft_type"]
    name = NAMES.get(kind)
    if name is None:
        hint = f"an adapter of {METHODS[method.name].title}"
        raise _refused(folder, f"is of a kind that is not trained here ({kind})", hint)
    if name != method.name:
        reason = f"is of {METHODS[name].title}, and this run trains {METHODS[method.name].title}"
        raise _refused(folder, reason, f"method={name}")
    if start := base_weight_init(facts):
        reason = f"starts in the base's own weights ({start}): on the base as it is, it means something else"
        raise _refused(folder, reason, "an adapter that was converted when it was saved (afina's are)")


def _same_meaning(facts: dict[str, Any], own: dict[str, Any], method: MethodConfig, folder: Path) -> None:
    for theirs, ours in MEANING[method.name].items():
        was, now = facts.get(theirs) or None, own.get(theirs) or None  # an adapter of an older PEFT lacks the newest
        if was == now:
            continue
        hint = f"method.{ours}={_typed(facts.get(theirs))}"
        if theirs in ("r", "init_r"):
            hint += f" method.alpha={_typed(facts.get('lora_alpha'))}"
        reason = f"the adapter to start from ({folder}) has {_typed(facts.get(theirs))}"
        raise config_error(f"method.{ours}", own.get(theirs), reason, hint)


def _with_taken_ranks(
    saved: dict[str, Tensor], pattern: dict[str, list[bool]], fresh: dict[str, Tensor]
) -> dict[str, Tensor]:
    """AdaLoRA's tensors with the ranks that were taken: those start afresh, with an E of zero, so they add nothing."""
    out = dict(saved)
    for name, kept in pattern.items():
        module = PREFIX + name.partition(".lora_E")[0]
        ranks = torch.tensor(kept)
        for part in "ABE":
            key = f"{module}.lora_{part}"
            if key not in fresh or key not in saved or len(fresh[key].T if part == "B" else fresh[key]) != len(ranks):
                continue  # told by the comparison of names and shapes
            whole, values = fresh[key].detach().clone(), saved[key].to(fresh[key])
            if part == "B":
                whole[:, ranks] = values
            else:
                whole[ranks] = values
            out[key] = whole
    return out


def _same_shapes(saved: dict[str, Tensor], mine: dict[str, Tensor], facts: dict[str, Any], folder: Path) -> None:
    modules, own = _modules(saved), _modules(mine)
    if modules != own:
        kinds, own_kinds = ({name.rpartition(".")[2] for name in names} for names in (modules, own))
        if kinds != own_kinds:
            listed = ",".join(sorted(kinds))
            reason = f"the adapter to start from ({folder}) is on {listed.replace(',', ', ')}"
            hint = f"method.target_modules=[{listed}]"
            raise config_error("method.target_modules", sorted(own_kinds), reason, hint)
        layers, own_layers = _layers(modules), _layers(own)
        reason = (
            f"the adapter to start from ({folder}, of {facts.get('base_model_name_or_path')}) is in others: {layers}"
        )
        raise config_error("method.layers", own_layers, reason, "its layers and its own base")
    if odd := sorted(set(saved) ^ set(mine)):
        raise _refused(folder, f"has other tensors than this run, {odd[0]} among them", "its own method and base")
    for name, tensor in mine.items():
        if saved[name].shape != tensor.shape:
            reason = f"has {name} of shape {tuple(saved[name].shape)}, and this run needs {tuple(tensor.shape)}"
            raise _refused(folder, reason, f"its own base, {facts.get('base_model_name_or_path')}")


def _modules(tensors: dict[str, Tensor]) -> set[str]:
    """Full names of the modules that hold adapters; none for prompt kinds. A module that takes another's place
    (bottleneck) has that one's name."""
    return {re.split(r"\.(?:lora_|ia3_l$|down\.|up\.)", name)[0] for name in tensors if "." in name}


def _layers(modules: set[str]) -> list[int]:
    return sorted({int(part) for name in modules for part in name.split(".") if part.isdigit()})


def _typed(value: Any) -> str:
    if isinstance(value, dict):
        return f"'{{{', '.join(f'{k}: {_typed(v)}' for k, v in value.items())}}}'"
    if isinstance(value, list):
        return f"[{','.join(map(_typed, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _refused(folder: Path, reason: str, hint: str) -> ConfigError:
    return config_error("method.adapter", folder, reason, hint)
