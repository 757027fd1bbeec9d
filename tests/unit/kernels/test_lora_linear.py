"""The written-out LoRA layer is PEFT's: outputs and every gradient, and what it does not compute is left to PEFT."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tests.helpers.architectures import tiny
from trainer.kernels import lora_linear
from trainer.kernels.lora_linear import AddLora, LoraLinear, patch_lora_linears

IDS = torch.arange(5, 35).view(2, 15)


def adapted(name: str = "qwen2", **keys: Any) -> Any:
    """LoRA on all linear layers (Qwen2's queries, keys and values have biases), B away from zero."""
    torch.manual_seed(0)
    targets = keys.pop("target_modules", "all-linear")
    model = get_peft_model(tiny(name), LoraConfig(r=4, lora_alpha=10, target_modules=targets, **keys))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.normal_(0, 0.1)
    return model


def gradients(model: Any, ids: Tensor = IDS) -> list[Tensor]:
    torch.manual_seed(1)  # dropout
    logits = model(input_ids=ids, use_cache=False).logits
    return [logits, *torch.autograd.grad(logits.square().mean(), [p for p in model.parameters() if p.requires_grad])]


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    return max(
        float((a - b).norm() / b.norm().clamp_min(1e-20)) for a, b in zip(one, other, strict=True) if b.norm() > 1e-12
    )


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the functions that ran."""
    names: list[str] = []
    for function in (LoraLinear, AddLora):

        def apply(*args: Any, whole: Any = function.apply, name: str = function.__name__) -> Any:
            names.append(name)
            return whole(*args)

        monkeypatch.setattr(lora_linear, function.__name__, type(function.__name__, (), {"apply": staticmethod(apply)}))
    return names


@pytest.mark.parametrize(
    ("keys", "function"),
    [
        ({}, "LoraLinear"),
        ({"use_rslora": True}, "LoraLinear"),
        ({"lora_dropout": 0.3}, "AddLora"),
        ({"modules_to_save": ["lm_head"]}, "LoraLinear"),
    ],
)
def test_every_gradient_is_pefts(keys: dict[str, Any], function: str, used: list[str]) -> None:
    model = adapted(**keys).train()
    expected = gradients(model)
    patch = patch_lora_linears(model)
    assert patch is not None
    assert distance(gradients(model), expected) < 1e-5
    assert set(used) == {function}
    patch.undo()
    assert all(torch.equal(one, other) for one, other in zip(gradients(model), expected, strict=True))


def test_a_layer_that_is_no_linear_keeps_its_own_product(used: list[str]) -> None:
    """GPT-2's Conv1D has its weight the other way round."""
    model = adapted("gpt2", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    expected = gradients(model)
    patch_lora_linears(model)
    assert distance(gradients(model), expected) < 1e-5
    assert set(used) == {"AddLora"}


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_keeps_its_own_product(bits: int, used: list[str]) -> None:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from peft.tuners.lora.bnb import dispatch_bnb_4bit, dispatch_bnb_8bit

    torch.manual_seed(0)
    if bits == 4:
        base: Any = Linear4bit(64, 128, bias=True, quant_type="nf4", compute_dtype=torch.float32)
    else:
        base = Linear8bitLt(64, 128, bias=True, has_fp16_weights=False, threshold=0.0)
    base = base.to("cpu").requires_grad_(False)
    dispatch = dispatch_bnb_4bit if bits == 4 else dispatch_bnb_8bit
    config = LoraConfig(r=4, lora_alpha=10)
    keys = {"loaded_in_4bit": bits == 4, "loaded_in_8bit": bits == 8}
    layer: Any = dispatch(base, "default", config=config, r=4, lora_alpha=10, **keys)
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(3, 7, 64, requires_grad=True)

    def through() -> list[Tensor]:
        out = layer(x)
        wanted = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        return [out, *torch.autograd.grad(out.square().sum(), wanted)]

    expected = through()
    patch_lora_linears(nn.ModuleList([layer]))
    assert distance(through(), expected) < 1e-5
    assert set(used) == {"AddLora"}


def test_not_further_from_the_truth_than_peft_in_bf16() -> None:
    """In the mean of several inputs: of one alone the two differ by chance, up to 1.3 times either way."""
    model = adapted()
    exact, half = copy.deepcopy(model).double(), model.to(torch.bfloat16)
    inputs = [torch.randint(5, 35, IDS.shape, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    truths = [gradients(exact, ids) for ids in inputs]

    def distances() -> list[float]:
        found = [gradients(half, ids) for ids in inputs]
        return [distance([g.double() for g in one], truth) for one, truth in zip(found, truths, strict=True)]

    by_peft = distances()
    patch_lora_linears(half)
    assert sum(distances()) <= 1.1 * sum(by_peft)


@pytest.mark.parametrize("way", ["disabled", "merged", "dora", "two adapters", "autocast"])
def test_what_it_does_not_compute_is_left_to_peft(way: str, used: list[str]) -> None:
    model = adapted(use_dora=way == "dora")
    if way == "two adapters":
        model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
        model.base_model.set_adapter(["default", "other"])
    if way == "merged":
        model.merge_adapter()

    def logits() -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            if way != "disabled":
                return model(input_ids=IDS).logits
            with model.disable_adapter():
                return model(input_ids=IDS).logits

    expected = logits()
    patch_lora_linears(model)
    assert torch.equal(logits(), expected)
    assert used == []


def test_a_model_without_lora_has_nothing_to_patch() -> None:
    assert patch_lora_linears(tiny("llama")) is None
