"""Translate the ``method`` group into stock PEFT's configurations."""

from __future__ import annotations

from typing import Any

from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig
from torch import nn

from trainer.config.method import MethodConfig, default_alpha, given
from trainer.config.rules.method import adalora_times
from trainer.errors import ConfigError
from trainer.methods.prompt_obstacle import prompt_obstacle
from trainer.methods.target_parameters import check_patterns, matching, parameter_names
from trainer.methods.target_selection import chosen_modules, is_narrowed, whole_names
from trainer.methods.targets import down_names, layer_index, target_names
from trainer.methods.text_part import other_parts, other_parts_pattern

TASK = "CAUSAL_LM"


def peft_config(model: nn.Module, method: MethodConfig, total_steps: int) -> PeftConfig:
    """Build the configuration of one of PEFT's methods.

    Args:
        model: the base model; named targets are looked up in it.
        method: the ``method`` group, checked; neither full nor bottleneck.
        total_steps: updates of the whole run; AdaLoRA's times follow from it.

    Raises:
        ConfigError: a named module or layer does not exist in this model, or AdaLoRA's times do not fit the run.
    """
    return {"lora": _lora, "adalora": _adalora, "ia3": _ia3, "prompt": _prompt, "prefix": _prefix}[method.name](
        model, method, total_steps
    )


def _targets(model: nn.Module, method: MethodConfig) -> dict[str, Any]:
    names, layers = chosen_modules(model, method)
    return {"target_modules": names, "layers_to_transform": layers, "exclude_modules": other_parts_pattern(model)}


def _lora(model: nn.Module, method: MethodConfig, _: int) -> PeftConfig:
    """Build LoRA (Hu et al., 2021), rsLoRA (Kalajdzievski, 2023), DoRA (Liu et al., 2024); alpha null means 2·r."""
    r, targets, parameters = given(method.r), _targets(model, method), parameter_names(model, method)
    if parameters is not None:
        check_patterns(method, [*whole_names(model, targets["target_modules"]), *matching(model, parameters)])
    return LoraConfig(
        task_type=TASK,
        r=r,
        lora_alpha=default_alpha(r) if method.alpha is None else method.alpha,
        lora_dropout=method.dropout,
        bias=_check_bias(model, method.bias),
        rank_pattern=dict(method.rank_pattern),
        alpha_pattern=dict(method.alpha_pattern),
        use_rslora=method.rslora,
        use_dora=method.dora,
        init_lora_weights=True if method.init == "default" else method.init,
        target_parameters=parameters,
        **targets,
    )


def _check_bias(model: nn.Module, bias: str) -> str:
    """Return ``method.bias``, checked: PEFT would train the biases of a vision tower too, which see no text."""
    names = [full for part in other_parts(model).values() for full, _ in part.named_parameters()]
    if bias == "all" and any("bias" in full for full in names):
        reason = f"takes in the biases of {', '.join(other_parts(model))}, which rows of text do not train"
        raise ConfigError("method.bias", value=bias, reason=reason, hint="method.bias=lora_only")
    return bias


def _adalora(model: nn.Module, method: MethodConfig, total_steps: int) -> PeftConfig:
    """Build AdaLoRA (Zhang et al., 2023)."""
    tinit, tfinal, delta = adalora_times(method, total_steps)
    init_r = given(method.init_r)
    return AdaLoraConfig(
        task_type=TASK,
        init_r=init_r,
        target_r=given(method.target_r),
        tinit=tinit,
        tfinal=tfinal,
        deltaT=delta,
        beta1=given(method.beta1),
        beta2=given(method.beta2),
        orth_reg_weight=given(method.orth_reg_weight),
        total_step=total_steps,
        lora_alpha=2 * init_r if method.alpha is None else method.alpha,
        lora_dropout=method.dropout,
        **_targets(model, method),
    )


def _ia3(model: nn.Module, method: MethodConfig, _: int) -> PeftConfig:
    """Build IA3 (Liu et al., 2022). PEFT has no layers for it: with ``layers``, whole module names are given."""
    feedforward = method.feedforward_modules
    target_names(model, feedforward or [])  # refuses names that do not exist
    names, layers = chosen_modules(model, method, also=feedforward or [])  # PEFT wants the ones among the others
    if layers is not None:
        names = [full for full in whole_names(model, names) if layer_index(full) in layers]
    are_whole = layers is not None or is_narrowed(method)
    ends = sorted({full.rpartition(".")[2] for full in names}) if are_whole else names
    inner = down_names(model, ends) if feedforward is None else feedforward
    if are_whole:
        inner = sorted({*names} & {*whole_names(model, inner)})
    names = sorted({*names, *inner})  # PEFT wants the ones among the others; GPT-2's c_proj is mlp.c_proj there
    towers = other_parts_pattern(model)
    return IA3Config(task_type=TASK, target_modules=names, feedforward_modules=inner, exclude_modules=towers)


def _check_virtual_tokens(model: nn.Module, method_name: str) -> None:
    if (why := prompt_obstacle(model, method_name)) is not None:
        reason = f"is not for {type(model).__name__}: {why}"
        raise ConfigError("method.name", value=method_name, reason=reason, hint="method=lora")


def _prompt(model: nn.Module, method: MethodConfig, _: int) -> PeftConfig:
    """Build prompt tuning (Lester et al., 2021). The words of init_text are put in by ``attach``: PEFT would write the
    tokenizer's path into the adapter."""
    _check_virtual_tokens(model, method.name)
    return PromptTuningConfig(
        task_type=TASK,
        num_virtual_tokens=method.virtual_tokens,
        prompt_tuning_init="SAMPLE_VOCAB" if method.init == "vocab" else "RANDOM",
    )


def _prefix(model: nn.Module, method: MethodConfig, _: int) -> PeftConfig:
    """Build prefix tuning (Li & Liang, 2021): keys and values before those of every row."""
    _check_virtual_tokens(model, method.name)
    return PrefixTuningConfig(
        task_type=TASK,
        num_virtual_tokens=method.virtual_tokens,
        prefix_projection=bool(method.prefix_projection),
        encoder_hidden_size=method.encoder_hidden_size,  # null: the model's own
        init_weights="zero" if method.init == "zero" else None,
    )
