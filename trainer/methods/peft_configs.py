"""Translate the ``method`` group into stock PEFT's configurations."""

from __future__ import annotations

from typing import Any

from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig
from torch import nn

from trainer.config.method import MethodConfig, default_alpha, given
from trainer.config.rules.method import adalora_times
from trainer.methods.targets import check_layers, down_names, layer_index, target_names

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
    return {
        "target_modules": target_names(model, method.target_modules),
        "layers_to_transform": check_layers(model, method.layers),
    }


def _lora(model: nn.Module, method: MethodConfig, _: int) -> PeftConfig:
    """Build LoRA (Hu et al., 2021), rsLoRA (Kalajdzievski, 2023), DoRA (Liu et al., 2024); alpha null means 2·r."""
    r = given(method.r)
    return LoraConfig(
        task_type=TASK,
        r=r,
        lora_alpha=default_alpha(r) if method.alpha is None else method.alpha,
        lora_dropout=method.dropout,
        bias=method.bias,
        rank_pattern=dict(method.rank_pattern),
        alpha_pattern=dict(method.alpha_pattern),
        use_rslora=method.rslora,
        use_dora=method.dora,
        init_lora_weights=True if method.init == "default" else method.init,
        **_targets(model, method),
    )


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
    """Build IA3 (Liu et al., 2022). PEFT has no layers for it: with ``layers``, full module names are given."""
    names = target_names(model, method.target_modules)
    inner = down_names(model, names) if method.feedforward_modules is None else method.feedforward_modules
    if method.feedforward_modules is not None:
        target_names(model, inner)  # refuses names that do not exist
    names = sorted({*names, *inner})  # PEFT wants the ones among the others
    if (layers := check_layers(model, method.layers)) is not None:
        names, inner = (_in_layers(model, some, layers) for some in (names, inner))
    return IA3Config(task_type=TASK, target_modules=names, feedforward_modules=inner)


def _in_layers(model: nn.Module, names: list[str], layers: list[int]) -> list[str]:
    """Return the full names of the modules that have one of these endings and stand in one of these layers."""
    return [
        full
        for full, _ in model.named_modules()
        if layer_index(full) in layers and any(full.endswith(f".{name}") for name in names)
    ]


def _prompt(_: nn.Module, method: MethodConfig, __: int) -> PeftConfig:
    """Build prompt tuning (Lester et al., 2021). The words of init_text are put in by ``attach``: PEFT would write the
    tokenizer's path into the adapter."""
    return PromptTuningConfig(
        task_type=TASK,
        num_virtual_tokens=method.virtual_tokens,
        prompt_tuning_init="SAMPLE_VOCAB" if method.init == "vocab" else "RANDOM",
    )


def _prefix(_: nn.Module, method: MethodConfig, __: int) -> PeftConfig:
    """Build prefix tuning (Li & Liang, 2021)."""
    return PrefixTuningConfig(
        task_type=TASK,
        num_virtual_tokens=method.virtual_tokens,
        prefix_projection=bool(method.prefix_projection),
        encoder_hidden_size=method.encoder_hidden_size,  # null: the model's own
        init_weights="zero" if method.init == "zero" else None,
    )
