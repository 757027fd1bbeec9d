"""Which parameters share a rate and a decay, beside transformers' rule and PEFT's function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import Trainer

from tests.helpers.architectures import tiny
from trainer.config import load
from trainer.engine.parameter_groups import (
    EMBEDDING_RATE,
    decay_spared,
    is_bias_or_norm,
    parameter_groups,
    set_rates,
)

PEAK = 1e-3


def config(*overrides: str) -> Any:
    return load(["model=tiny", "data=headlines", f"optim.learning_rate={PEAK}", *overrides])


def names(model: torch.nn.Module, parameters: list[torch.nn.Parameter]) -> set[str]:
    by_id = {id(p): name for name, p in model.named_parameters()}
    return {by_id[id(p)] for p in parameters}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3", "phi", "gpt2", "gpt_neox", "mixtral"])
def test_what_does_not_decay_is_what_the_trainer_of_transformers_leaves_out(architecture: str) -> None:
    model = tiny(architecture)
    decaying = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    for name, _ in model.named_parameters():
        assert is_bias_or_norm(model, name) == (name not in decaying), name


def test_a_norm_is_one_whatever_it_is_called() -> None:
    """Mamba's last one is norm_f, which transformers' rule by name does not know."""
    model = tiny("mamba")
    decaying = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    differing = [n for n, _ in model.named_parameters() if is_bias_or_norm(model, n) == (n in decaying)]
    assert differing == ["backbone.norm_f.weight"]


def test_there_is_one_group_where_nothing_asks_for_more() -> None:
    model = tiny("llama")
    trained = dict(model.named_parameters())
    for typed in ((), ("optim.weight_decay=0.1", "optim.decay_biases_and_norms=true")):
        (group,) = parameter_groups(model, trained, config(*typed))
        assert names(model, group["params"]) == set(trained)
    decaying, spared = parameter_groups(model, trained, config("optim.weight_decay=0.1"))
    assert (decaying["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert {name.split(".")[-2] for name in names(model, spared["params"])} == {
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
    }
    decay_spared([decaying, spared], 0.1)
    assert (decaying["weight_decay"], spared["weight_decay"]) == (0.1, 0.1)


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"bias": "lora_only"}, {"target_modules": ["c_attn", "wte"]}])
def test_the_groups_of_lora_plus_are_those_of_peft(more: dict[str, Any]) -> None:
    """GPT-2 has biases everywhere, and PEFT puts those that it trains beside B."""
    model = get_peft_model(tiny("gpt2"), LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True, **more))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=PEAK, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )
    expected = {
        name: (group["lr"], group["weight_decay"])
        for group in theirs.param_groups
        for name in names(model, group["params"])
    }
    groups = parameter_groups(model, trained, config("optim.lora_plus_ratio=16", "optim.weight_decay=0.1"))
    set_rates(groups, PEAK)
    found = {name: (group["lr"], group["weight_decay"]) for group in groups for name in names(model, group["params"])}
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values), name
    set_rates(groups, PEAK / 4)
    assert {round(group["lr"] / PEAK, 9) for group in groups} <= {0.25, 4.0, round(EMBEDDING_RATE / PEAK / 4, 9)}
