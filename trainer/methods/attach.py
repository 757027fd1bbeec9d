"""Attach the trainable parameters to a model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from trainer.compat.peft import is_rank_divisor, prompt_start
from trainer.config.method import MethodConfig
from trainer.errors import ConfigError
from trainer.methods.bottleneck import attach_bottleneck
from trainer.methods.parameters import trial_parameters
from trainer.methods.peft_configs import peft_config
from trainer.methods.text_part import train_text_part
from trainer.methods.token_embeddings import add_embeddings, check_embeddings, is_tied
from trainer.methods.warm_start import warm_start


def attach(
    model: nn.Module,
    method: MethodConfig,
    seed: int,
    total_steps: int = 1,
    text_ids: list[int] | None = None,
    token_ids: list[int] | None = None,
) -> nn.Module:
    """Freeze the base and add the trainable parameters: fresh, or with the values of ``method.adapter`` (warm start).

    Args:
        model: the base model.
        method: the ``method`` group, checked.
        seed: the adapters are initialised by it, the same on every rank.
        total_steps: updates of the whole run, which AdaLoRA's times follow from.
        text_ids: tokens of ``method.init_text``.
        token_ids: of ``method.trainable_tokens``.

    Returns:
        The model itself (full, bottleneck), or stock PEFT's wrapper of it. Of a multimodal model the text part alone
        is trained. What is added has the dtype of the base: its fp32 copies are the optimizer's.

    Raises:
        ConfigError: a named module or layer does not exist in this model; ``method.adapter`` is of another
            method, shape or base.
        CheckpointError: ``method.adapter`` cannot be read.
    """
    if method.name == "full":
        return train_text_part(model)
    torch.manual_seed(seed)
    if method.name == "bottleneck":
        adapted = attach_bottleneck(model, method)
    else:
        adapted = _attach_peft(model, method, total_steps, text_ids, token_ids or [])
    if method.adapter is not None:
        warm_start(adapted, method, Path(method.adapter))
    return adapted


def attach_trials(model: nn.Module, trials: Mapping[str, tuple[MethodConfig, int]]) -> PeftModel:
    """Attach the LoRA adapters of several trials to one base, each as :func:`attach` gives it to a model of its own.

    Args:
        model: the base model.
        trials: the ``method`` group and the seed of each, by the name of its adapter.

    Returns:
        Stock PEFT's wrapper with an adapter a trial, all of them trainable; the first one is PEFT's active adapter.

    Raises:
        ConfigError: a named module or layer does not exist in this model.
    """
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    # before any is attached: the base's modules still have their own names
    configs = {name: peft_config(model, method, 1) for name, (method, _) in trials.items()}
    wrapped: PeftModel | None = None
    for name, config in configs.items():
        torch.manual_seed(trials[name][1])
        if wrapped is None:
            wrapped = PeftModel(model, config, adapter_name=name, autocast_adapter_dtype=False)
        else:
            wrapped.add_adapter(name, config, autocast_adapter_dtype=False)
    assert wrapped is not None, "a group has trials"
    for name in trials:
        for parameter in trial_parameters(wrapped, name).values():
            parameter.requires_grad_(True)
            parameter.data = parameter.data.to(dtype)
    return wrapped


def _attach_peft(
    model: nn.Module, method: MethodConfig, total_steps: int, text_ids: list[int] | None, token_ids: list[int]
) -> nn.Module:
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    config = peft_config(model, method, total_steps)
    trains_embeddings = bool(token_ids or method.modules_to_save)
    was_tied = trains_embeddings and is_tied(model)
    if trains_embeddings:
        add_embeddings(config, model, method, token_ids)
    wrapped = _wrap(model, config, method)
    if trains_embeddings:
        check_embeddings(wrapped, was_tied, method)
    if method.init == "text":
        assert text_ids, "the words of method.init_text give tokens"
        _init_from_tokens(wrapped, text_ids)
    for name, parameter in wrapped.named_parameters():
        if is_rank_divisor(name):
            parameter.requires_grad_(False)
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return wrapped


def _wrap(model: nn.Module, config: PeftConfig, method: MethodConfig) -> nn.Module:
    """Put PEFT's layers into a model."""
    with warnings.catch_warnings():
        if method.target_parameters is not None:  # it looks for patterns of parameters among modules alone
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        try:
            return get_peft_model(model, config, autocast_adapter_dtype=False)
        except (ValueError, AttributeError) as error:  # its way of saying that it does not know a model or a layer
            said = " ".join(str(error).split())[:200]
            raise ConfigError(
                "method.name",
                value=method.name,
                reason=f"is refused by PEFT for {type(model).__name__}: {said}",
                hint="method=lora method.target_modules=all_linear",
            ) from error


def _init_from_tokens(model: Any, ids: list[int]) -> None:
    """Initialise virtual tokens with the embeddings of these tokens, repeated or cut."""
    prompt, words = prompt_start(model)
    repeated = torch.tensor([ids[k % len(ids)] for k in range(len(prompt.weight))], device=words.weight.device)
    with torch.no_grad():
        prompt.weight.copy_(words(repeated))


def is_prompt_learning(model: Any) -> bool:
    """Return whether virtual tokens stand before every row (prompt and prefix tuning)."""
    return isinstance(model, PeftModel) and bool(model.active_peft_config.is_prompt_learning)


def virtual_tokens(model: Any) -> int:
    """Return how many virtual tokens stand before every row."""
    return int(model.active_peft_config.num_virtual_tokens) if is_prompt_learning(model) else 0
