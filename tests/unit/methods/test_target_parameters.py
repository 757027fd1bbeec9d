"""LoRA on the experts of six families: against stock PEFT, saved, loaded, merged, continued, taken off; wrong names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from tests.helpers.architectures import tiny
from tests.helpers.mixtures import FAMILIES, mixture
from trainer.config.method import MethodConfig
from trainer.engine.flops import count_flops
from trainer.engine.zero_engine import largest_kept
from trainer.errors import ConfigError
from trainer.merge.fold import fold
from trainer.methods import AdapterSwitcher, attach, load_adapter, save_adapter, trainable_parameters
from trainer.methods.target_parameters import adapters_of_parameters, describe_unreached, parameter_names

STACKS = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
EXPERTS: dict[str, Any] = {"r": 2, "target_modules": ["o_proj"], "target_parameters": "experts"}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def trained(family: str, **keys: Any) -> Any:
    model = attach(mixture(family), MethodConfig(**{**EXPERTS, **keys}), seed=0).eval()
    torch.manual_seed(3)
    for parameter in trainable_parameters(model).values():
        nn.init.normal_(parameter, std=0.2)
    return model


def saved(model: Any, folder: Path) -> Path:
    save_adapter(model, folder, trainable_parameters(model))
    return folder


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stack_gets_the_adapter_that_stock_peft_gives_it(family: str) -> None:
    base = mixture(family)
    stacks = {n: p for n, p in base.named_parameters() if p.dim() == 3}
    assert parameter_names(base, MethodConfig(**EXPERTS)) == STACKS
    model = attach(base, MethodConfig(**EXPERTS), seed=7)
    plain, targets = mixture(family), {"target_modules": ["o_proj"], "target_parameters": STACKS}
    torch.manual_seed(7)
    stock = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, **targets))
    expected = {n: p for n, p in stock.named_parameters() if p.requires_grad}
    found = trainable_parameters(model)
    assert set(found) == set(expected)
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    on_stacks = sum(p.numel() for p in found.values() if id(p) in adapters_of_parameters(model))
    assert on_stacks == sum(2 * p.shape[0] * (p.shape[1] + p.shape[2]) for p in stacks.values())
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and (p.grad != 0).any() for n, p in found.items() if "lora_B" in n)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_it_is_what_it_was_for_stock_peft_and_merged_too(family: str, tmp_path: Path) -> None:
    model = trained(family)
    expected = logits(model)
    assert distance(logits(mixture(family)), expected) > 1e-3, "it does something"
    folder = saved(model, tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(mixture(family), str(folder)).eval()), expected)
    assert torch.equal(logits(load_adapter(mixture(family), folder).eval()), expected)
    plain, layers = fold(model)
    assert layers == sum(name.endswith(("o_proj", *STACKS)) for name in names_of(mixture(family)))
    assert distance(logits(plain), expected) < 1e-5
    assert set(plain.state_dict()) == set(mixture(family).state_dict())


def names_of(model: nn.Module) -> list[str]:
    return [name.removesuffix(".weight") for name, _ in model.named_parameters()]


def test_taken_off_the_base_is_what_it_was(tmp_path: Path) -> None:
    """Of two stacks of a module one adapter stands around the other."""
    folder, base = saved(trained("mixtral"), tmp_path), mixture("mixtral")
    before, alone = {n: t.clone() for n, t in base.state_dict().items()}, logits(base)
    switcher = AdapterSwitcher(base, {"experts": folder, "none": None})
    for _ in range(2):
        assert distance(logits(switcher.use("experts")), alone) > 1e-3
        assert torch.equal(logits(switcher.use("none")), alone)
        after = base.state_dict()
        assert set(after) == set(before)
        assert all(torch.equal(after[n], t) for n, t in before.items())


def test_a_warm_start_is_of_the_same_parameters(tmp_path: Path) -> None:
    model = trained("qwen3_moe")
    folder = saved(model, tmp_path)
    same = MethodConfig(**{**EXPERTS, "adapter": str(folder), "target_parameters": [s[4:] for s in STACKS]})
    assert torch.equal(logits(attach(mixture("qwen3_moe"), same, seed=1).eval()), logits(model))
    other = {"none": None, "one": ["experts.down_proj"]}
    for target in other.values():
        keys = {**EXPERTS, "adapter": str(folder), "target_parameters": target}
        with pytest.raises(ConfigError, match=r"method\.target_parameters=.* has \[mlp\.experts\.down_proj,mlp\.") as e:
            attach(mixture("qwen3_moe"), MethodConfig(**keys), seed=1)
        assert str(e.value).endswith("'method.target_parameters=[mlp.experts.down_proj,mlp.experts.gate_up_proj]'")
    keys = {**EXPERTS, "adapter": str(folder), "target_modules": ["q_proj"]}
    with pytest.raises(
        ConfigError, match=r"target_modules=\[q_proj\]: .* is on o_proj → 'method\.target_modules=\[o_pr"
    ):
        attach(mixture("qwen3_moe"), MethodConfig(**keys), seed=1)
    with pytest.raises(ConfigError, match=r"method\.layers="):
        attach(mixture("qwen3_moe"), MethodConfig(**{**EXPERTS, "adapter": str(folder), "layers": [1]}), seed=1)


@pytest.mark.filterwarnings("error:The following")
def test_alone_in_some_layers_of_another_rank(tmp_path: Path) -> None:
    keys = {"target_modules": [], "layers": [1], "rank_pattern": {"experts.down_proj": 3}}
    model = trained("olmoe", **keys)
    shapes = {name.split("layers.")[1]: tuple(p.shape) for name, p in trainable_parameters(model).items()}
    assert shapes == {
        "1.mlp.experts.base_layer.lora_A.default.weight": (2 * 4, 32),
        "1.mlp.experts.base_layer.lora_B.default.weight": (96, 2 * 4),
        "1.mlp.experts.lora_A.default.weight": (3 * 4, 48),
        "1.mlp.experts.lora_B.default.weight": (32, 3 * 4),
    }
    with pytest.warns(RuntimeWarning, match="did not match"):  # PEFT's own, which is wrong
        again = PeftModel.from_pretrained(mixture("olmoe"), str(saved(model, tmp_path))).eval()
    assert torch.equal(logits(again), logits(model))
    assert set(names_of(again)) == set(names_of(model))


def test_a_parameter_of_two_dimensions(tmp_path: Path) -> None:
    """A router, named on purpose."""
    model = trained("mixtral", target_parameters=["gate.weight"])
    assert sum(p.numel() for p in map(model.get_parameter, routers(model))) == 2 * 2 * (32 + 4)
    expected = logits(model)
    assert torch.equal(logits(load_adapter(mixture("mixtral"), saved(model, tmp_path)).eval()), expected)
    assert distance(logits(fold(model)[0]), expected) < 1e-5


def routers(model: nn.Module) -> list[str]:
    return [name for name in trainable_parameters(model) if ".gate.lora_" in name]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"target_parameters": ["mlp.experts.w1"]}, "no parameter of MixtralForCausalLM.*experts.down_proj.*=experts"),
        ({"target_parameters": ["q_proj.weight"]}, "beside those of layers that are targets as modules"),
        ({"target_parameters": ["norm.weight"]}, "has 1 dimensions; adapters are for 2 and 3"),
        ({"rank_pattern": {"w1": 3}}, r"method\.rank_pattern=.*w1.*is for nothing that gets an adapter, which are "),
        ({"layers": [7]}, r"method\.layers=\[7\]: MixtralForCausalLM has 2 layers"),
    ],
)
def test_what_takes_no_adapter_is_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        attach(mixture("mixtral"), MethodConfig(**{**EXPERTS, **keys}), seed=0)


def test_where_there_are_no_experts() -> None:
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM has no experts.*target_parameters=null"):
        parameter_names(tiny("llama"), MethodConfig(**EXPERTS))
    with pytest.raises(ConfigError, match=r"method\.layers=\[0\]: leaves out every layer that has .*: 1 → "):
        parameter_names(mixture("deepseek_v3"), MethodConfig(**{**EXPERTS, "layers": [0]}))


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_what_is_said_of_experts(bits: int) -> None:
    base, dense = mixture("mixtral"), tiny("llama")
    counts = [p.numel() for p in base.parameters() if p.dim() == 3]
    plain, some = MethodConfig(bits=bits), MethodConfig(bits=bits, target_parameters=["experts.down_proj"], r=2)
    said = describe_unreached(base, plain)
    assert said is not None
    assert said.startswith(f"experts: {sum(counts):,} weights (experts.down_proj, experts.gate_up_proj) are 3-D")
    assert "no adapter reaches" in said
    assert ("not quantised" in said) == (bits < 16)
    assert said.endswith("; method.target_parameters=experts adapts them")
    assert describe_unreached(base, MethodConfig(name="ia3", bits=bits)) == said.replace("; m", "; method=lora m")
    assert describe_unreached(dense, plain) is None
    dense.add_module("conv", nn.Conv1d(4, 4, 3))
    assert describe_unreached(dense, plain) is None, "a convolution is no expert"
    attach(base, some, seed=0)
    half = describe_unreached(base, some)
    assert half is not None
    assert half.startswith(
        f"experts: {2 * max(counts):,} weights (experts.gate_up_proj) are 3-D parameters, which no a"
    )
    assert "target_parameters" not in half
    whole = mixture("mixtral")
    attach(whole, MethodConfig(**EXPERTS, bits=bits), seed=0)
    all_adapted = describe_unreached(whole, MethodConfig(**EXPERTS, bits=bits))
    assert (all_adapted is None) == (bits == 16)
    assert bits == 16 or "not quantised" in str(all_adapted)
    assert "reaches" not in str(all_adapted)


def test_zero_3_keeps_no_tensor_whole_because_experts_have_large_adapters() -> None:
    model = attach(mixture("mixtral"), MethodConfig(**{**EXPERTS, "r": 8}), seed=0)
    assert max(p.numel() for p in trainable_parameters(model).values()) == 4 * 8 * 96
    assert largest_kept(model) == 8 * 32
    assert largest_kept(attach(mixture("mixtral"), MethodConfig(**{**EXPERTS, "target_modules": []}), seed=0)) == 0


def test_a_token_costs_the_adapters_of_its_own_experts() -> None:
    """Of 4 experts it meets 2, and half of their adapters: 6 operations a weight, 4 where it is frozen."""
    model = attach(mixture("mixtral"), MethodConfig(**EXPERTS), seed=0)
    skipped = ("embed_tokens", "lm_head")
    weights = {n: p for n, p in model.named_parameters() if p.dim() > 1 and not any(each in n for each in skipped)}
    assert sum("experts" in name for name in weights) == 2 * (2 + 4)
    expected = sum(
        (6 if p.requires_grad else 4) * p.numel() * (0.5 if "experts" in n else 1) for n, p in weights.items()
    )
    assert count_flops(model).per_token == expected
