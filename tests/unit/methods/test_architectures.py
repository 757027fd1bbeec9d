"""What differs from architecture to architecture: names of layers, tries, experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.architectures import ARCHITECTURES, MIXTURES, MLP, tiny
from tests.unit.engine.test_verify_trie import DATA, config
from trainer.config import load
from trainer.config.method import MethodConfig
from trainer.engine.verify_trie import choose_packing
from trainer.errors import ConfigError, ModelError
from trainer.kernels.label_loss import LabelLoss
from trainer.methods import attach, trainable_parameters
from trainer.methods.bottleneck import find_projections
from trainer.methods.targets import describe_unreached, down_names, target_names
from trainer.models.loading import load_model, use_trie_kernel

CPU = torch.device("cpu")
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


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bottlenecks_stand_behind_attention_and_mlp(name: str) -> None:
    """One of each a layer, and each as wide as the model; of experts it is said why there is none."""
    model, row = tiny(name), ARCHITECTURES[name]
    if not row.down:
        with pytest.raises(ConfigError, match=r"method\.placement=pfeiffer: .*experts are 3-D parameters"):
            find_projections(model, "pfeiffer", None)
        return
    found = [full for full, _ in find_projections(model, "houlsby", None)]
    assert sum(full.endswith(row.attention_end) for full in found) == 2
    assert sum(full.endswith(row.down) for full in found) == 2 == len(find_projections(model, "pfeiffer", None))
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
