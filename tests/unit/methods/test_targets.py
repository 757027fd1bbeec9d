"""Target modules on every architecture: names of layers, places of bottlenecks, experts; wrong names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.architecture_table import DENSE
from tests.helpers.architectures import ARCHITECTURES, MIXTURES, MLP, QKVO, random_model, tiny
from trainer.config.method import MethodConfig
from trainer.errors import ConfigError
from trainer.methods import attach, count_parameters, trainable_parameters
from trainer.methods.bottleneck import find_projections
from trainer.methods.targets import down_names, target_names

EXPERTS = r"experts \(experts\.down_proj, experts\.gate_up_proj\) are 3-D parameters"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_of_layers(name: str) -> None:
    model = tiny(name)
    row = ARCHITECTURES[name]
    assert set(target_names(model, "attention_min")) == row.query_value
    assert set(target_names(model, "attention")) == row.attention
    assert set(target_names(model, "all_linear")) == row.linear
    assert down_names(model, sorted(row.linear)) == ([row.down] if row.down else [])
    with pytest.raises(ConfigError) as caught:
        target_names(model, ["nothing"])
    assert all(f"{each.rpartition('.')[2]} (×" in str(caught.value) for each in row.linear)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *DENSE])
def test_bottlenecks_stand_behind_attention_and_mlp(name: str) -> None:
    """One of each a layer, and each as wide as the model; of experts it is said why there is none."""
    row = {**ARCHITECTURES, **DENSE}[name]
    model = random_model(row)
    if not row.down:
        with pytest.raises(ConfigError, match=r"method\.placement=pfeiffer: .*experts are 3-D parameters"):
            find_projections(model, "pfeiffer", None)
        return
    found = [full for full, _ in find_projections(model, "houlsby", None)]
    layers = model.config.num_hidden_layers
    assert sum(full.endswith(row.attention_end) for full in found) == layers
    assert sum(full.endswith(row.down) for full in found) == layers == len(find_projections(model, "pfeiffer", None))
    assert len(found) == 2 * layers
    adapted = attach(
        model, MethodConfig(name="bottleneck", reduction_factor=4, placement="houlsby", activation="relu"), 0
    )
    assert {p.shape for n, p in trainable_parameters(adapted).items() if n.endswith("down.weight")} == {(8, 32)}


@pytest.mark.parametrize("wrong", ["experts", "mlp.experts", "gate_up_proj", "down_proj", "w1", "gate"])
def test_experts_are_no_target_and_it_is_said(wrong: str) -> None:
    with pytest.raises(ConfigError, match=EXPERTS) as caught:
        target_names(tiny("mixtral"), ["q_proj", wrong])
    assert str(caught.value).startswith(f"method.target_modules={wrong}: takes no adapters in MixtralForCausalLM")


@pytest.mark.parametrize("name", MIXTURES)
def test_all_linear_of_a_mixture_is_what_it_says(name: str) -> None:
    """PEFT knows experts as the linear layers that they were: some names it would move to the stacked experts."""
    model, expected = tiny(name), MIXTURES[name].linear
    assert set(target_names(model, "all_linear")) == expected
    adapted = attach(model, MethodConfig(r=2), seed=0)
    trained = {full.split(".lora_")[0] for full in trainable_parameters(adapted)}
    assert {full.rpartition(".")[2] for full in trained} == expected
    assert not any("experts" in full or full.endswith("gate") for full in trained)


def test_a_name_that_peft_would_move_to_the_experts_is_refused() -> None:
    for name in MLP:
        with pytest.raises(ConfigError, match=rf"method\.target_modules={name}: is what PEFT calls the experts"):
            target_names(tiny("first layer dense"), ["q_proj", name])


def test_a_router_is_trained_only_when_it_is_named() -> None:
    model = tiny("shared experts")
    assert "shared_expert_gate" not in target_names(model, "all_linear")
    assert target_names(model, ["shared_expert_gate"]) == ["shared_expert_gate"]


def adapted(model: nn.Module) -> set[str]:
    """Full names of the modules that hold trained tensors."""
    return {n.split(".lora_")[0].removeprefix("base_model.model.") for n in trainable_parameters(model)}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("wanted", ["attention_min", "attention", "all_linear"])
def test_target_sets_on_many_architectures(name: str, wanted: str) -> None:
    row = ARCHITECTURES[name]
    expected = {"attention_min": row.query_value, "attention": row.attention, "all_linear": row.linear}[wanted]
    with torch.device("meta"):
        base = tiny(name)
    inside = {
        full
        for full, module in base.named_modules()
        if any(f".{full}".endswith(f".{each}") for each in expected)
        and (wanted == "all_linear" or "mlp" not in full)
        and not list(module.children())
    }
    sizes = {full: sum(base.get_submodule(full).weight.shape) for full in inside}
    model = attach(base, MethodConfig(r=3, target_modules=wanted), seed=0)
    assert adapted(model) == inside
    assert len(inside) >= 2 * len(expected)  # GPT-2 has a c_proj in its MLP too
    assert count_parameters(model)[0] == 3 * sum(sizes.values())  # A is r × in, B is out × r


@pytest.mark.parametrize("wrong", ["query", "mlp", "input_layernorm", "proj", "layers"])
def test_a_wrong_target_lists_what_there_is(model: Any, wrong: str) -> None:
    with pytest.raises(ConfigError) as caught:
        attach(model, MethodConfig(r=4, target_modules=["q_proj", wrong]), seed=0)
    message = str(caught.value)
    assert message.startswith(f"method.target_modules={wrong}: ")
    assert "LlamaForCausalLM" in message
    assert all(f"{name} (×2)" in message for name in QKVO | MLP)
    assert "lm_head" not in message


def test_a_set_that_a_model_lacks_lists_what_there_is() -> None:
    with torch.device("meta"):
        model = tiny("mamba")
    with pytest.raises(ConfigError, match=r"method\.target_modules=attention: .*in_proj \(×2\).*all_linear"):
        target_names(model, "attention")
