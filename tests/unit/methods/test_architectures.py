"""What differs from architecture to architecture: names of layers, tries, experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from tests.helpers.architectures import ARCHITECTURES, SIZES, tiny
from tests.unit.engine.test_verify_trie import DATA, config
from trainer.config import load
from trainer.config.method import MethodConfig
from trainer.engine.verify_trie import choose_packing
from trainer.errors import ConfigError, ModelError
from trainer.kernels.label_loss import LabelLoss
from trainer.methods import attach, trainable_parameters
from trainer.methods.bottleneck import places
from trainer.methods.targets import describe_unreached, down_names, target_names
from trainer.models.loading import load_model, use_trie_kernel

CPU = torch.device("cpu")
QKVO, MLP = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
# query and value; attention; all linear layers; the MLP's last; the last of attention in full
LLAMA = {"q_proj", "v_proj"}, QKVO, QKVO | MLP, "down_proj", "self_attn.o_proj"
NAMES: dict[str, tuple[set[str], set[str], set[str], str, str]] = {
    **dict.fromkeys(ARCHITECTURES, LLAMA),
    "phi": (
        {"q_proj", "v_proj"},
        {"q_proj", "k_proj", "v_proj", "dense"},
        {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"},
        "fc2",
        "self_attn.dense",
    ),
    "phi3": (
        {"qkv_proj"},
        {"qkv_proj", "o_proj"},
        {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
        "down_proj",
        "self_attn.o_proj",
    ),
    "gpt2": (
        {"c_attn"},
        {"c_attn", "attn.c_proj"},
        {"c_attn", "c_proj", "c_fc"},
        "mlp.c_proj",
        "attn.c_proj",
    ),
    "gpt_neox": (
        {"query_key_value"},
        {"query_key_value", "dense"},
        {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
        "dense_4h_to_h",
        "attention.dense",
    ),
    "mixtral": ({"q_proj", "v_proj"}, QKVO, QKVO, "", "self_attn.o_proj"),
}
EXPERTS = r"experts \(experts\.down_proj, experts\.gate_up_proj\) are 3-D parameters"
# Mixtures with linear layers beside the stacked experts, and what all_linear means in them.
MIXTURES: dict[str, tuple[Any, set[str]]] = {
    "shared experts": (
        transformers.Qwen2MoeConfig(
            **SIZES, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=24
        ),
        QKVO | MLP,
    ),
    "first layer dense": (
        transformers.Qwen3MoeConfig(
            **SIZES, head_dim=8, num_experts=4, moe_intermediate_size=16, mlp_only_layers=[0]
        ),
        QKVO,  # PEFT would take its gate_proj, up_proj and down_proj for the experts'
    ),
}  # fmt: skip


def mixture(name: str) -> Any:
    return transformers.AutoModelForCausalLM.from_config(MIXTURES[name][0])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_of_layers(name: str) -> None:
    model = tiny(name)
    least, attention, every, down, _ = NAMES[name]
    assert set(target_names(model, "attention_min")) == least
    assert set(target_names(model, "attention")) == attention
    assert set(target_names(model, "all_linear")) == every
    assert down_names(model, sorted(every)) == ([down] if down else [])
    with pytest.raises(ConfigError) as caught:
        target_names(model, ["nothing"])
    assert all(f"{each.rpartition('.')[2]} (×" in str(caught.value) for each in every)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bottlenecks_stand_behind_attention_and_mlp(name: str) -> None:
    """One of each a layer, and each as wide as the model; of experts it is said why there is none."""
    model, (*_, down, end) = tiny(name), NAMES[name]
    if not down:
        with pytest.raises(ConfigError, match=r"method\.placement=pfeiffer: .*experts are 3-D parameters"):
            places(model, "pfeiffer", None)
        return
    found = [full for full, _ in places(model, "houlsby", None)]
    assert sum(full.endswith(end) for full in found) == 2
    assert sum(full.endswith(down) for full in found) == 2 == len(places(model, "pfeiffer", None))
    assert len(found) == 4
    adapted = attach(
        model, MethodConfig(name="bottleneck", reduction_factor=4, placement="houlsby", activation="relu"), 0
    )
    assert {p.shape for n, p in trainable_parameters(adapted).items() if n.endswith("down.weight")} == {(8, 32)}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tries_are_proved_or_padding_is_explained(name: str) -> None:
    torch.manual_seed(0)
    model = tiny(name)
    use_trie_kernel(model)
    packing, why = choose_packing(model, LabelLoss(model), config("auto"), DATA, 0)
    if name == "gemma2":  # its scores are capped, which SDPA cannot do
        assert not packing.uses_trie
        assert "attention is eager, which knows padded rows only" in why
    else:
        assert packing.uses_trie, why


def test_a_model_with_capped_scores_keeps_the_attention_of_its_authors(tmp_path: Path) -> None:
    model = tiny("gemma2", initializer_range=1.0)
    model.save_pretrained(tmp_path)
    keys = load(["debug=tiny"])
    loaded: Any = load_model(str(tmp_path), keys.model, keys.method, torch.float32, CPU, 2)
    ids = torch.arange(2, 30)[None]
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    keys.model.attention = "sdpa"
    with pytest.raises(ModelError, match=r"→ model\.attention=auto"):
        load_model(str(tmp_path), keys.model, keys.method, torch.float32, CPU, 2)


@pytest.mark.parametrize("wrong", ["experts", "mlp.experts", "gate_up_proj", "down_proj", "w1", "gate"])
def test_experts_are_no_target_and_it_is_said(wrong: str) -> None:
    with pytest.raises(ConfigError, match=EXPERTS) as caught:
        target_names(tiny("mixtral"), ["q_proj", wrong])
    assert str(caught.value).startswith(f"method.target_modules={wrong}: takes no adapters in MixtralForCausalLM")


@pytest.mark.parametrize("name", MIXTURES)
def test_all_linear_of_a_mixture_is_what_it_says(name: str) -> None:
    """PEFT knows experts as the linear layers that they were: some names it would move to the stacked experts."""
    model, expected = mixture(name), MIXTURES[name][1]
    assert set(target_names(model, "all_linear")) == expected
    adapted = attach(model, MethodConfig(r=2), seed=0)
    trained = {full.split(".lora_")[0] for full in trainable_parameters(adapted)}
    assert {full.rpartition(".")[2] for full in trained} == expected
    assert not any("experts" in full or full.endswith("gate") for full in trained)


def test_a_name_that_peft_would_move_to_the_experts_is_refused() -> None:
    for name in MLP:
        with pytest.raises(ConfigError, match=rf"method\.target_modules={name}: is what PEFT calls the experts"):
            target_names(mixture("first layer dense"), ["q_proj", name])


def test_a_router_is_trained_only_when_it_is_named() -> None:
    model = mixture("shared experts")
    assert "shared_expert_gate" not in target_names(model, "all_linear")
    assert target_names(model, ["shared_expert_gate"]) == ["shared_expert_gate"]


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_what_no_adapter_reaches_is_said(bits: int) -> None:
    model = tiny("mixtral")
    experts = [p for layer in model.model.layers for p in layer.mlp.experts.parameters()]
    said = describe_unreached(model, bits)
    assert said is not None
    assert said.startswith(f"experts: {sum(p.numel() for p in experts):,} weights (experts.down_proj, experts.gate_up_")
    assert ("are not quantised" in said) == (bits < 16)
    assert describe_unreached(tiny("llama"), bits) is None
    conv = nn.Conv1d(4, 4, 3)
    assert describe_unreached(nn.Sequential(conv), bits) is None, "a convolution is no expert"


@pytest.mark.parametrize("bits", [8, 4])
def test_quantising_passes_over_experts(bits: int, tmp_path: Path) -> None:
    tiny("mixtral", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    keys = load(["debug=tiny", f"method.bits={bits}"])
    model: Any = load_model(str(tmp_path), keys.model, keys.method, torch.bfloat16, CPU, 2)
    layer = model.model.layers[0]
    assert layer.self_attn.q_proj.weight.dtype in (torch.uint8, torch.int8)
    assert {p.dtype for p in layer.mlp.experts.parameters()} == {torch.bfloat16}
    assert "are not quantised" in (describe_unreached(model, bits) or "")
