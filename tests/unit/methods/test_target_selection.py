"""Targets by regular expression and less some: what stock PEFT makes of the same, on every method that has targets."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from tests.helpers.architectures import tiny
from tests.helpers.mixtures import mixture
from trainer.config.method import MethodConfig
from trainer.errors import ConfigError
from trainer.methods import attach, save_adapter, trainable_parameters
from trainer.methods.target_selection import chosen_modules, is_target

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 2},
    "adalora": {
        "init_r": 4,
        "target_r": 2,
        "beta1": 0.8,
        "beta2": 0.8,
        "orth_reg_weight": 0.5,
        "tinit": 1,
        "tfinal": 1,
    },
    "ia3": {},
}
LLAMA = tiny("llama")
LINEAR = [name for name, module in LLAMA.named_modules() if isinstance(module, nn.Linear)]


def adapted(model: nn.Module) -> set[str]:
    names = trainable_parameters(model)
    return {re.split(r"\.(?:lora_|ia3_l)", n)[0].removeprefix("base_model.model.") for n in names}


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"target_modules": r".*\.1\..*(q|v)_proj"}, "model.layers.1.self_attn.[qv]_proj"),
        ({"target_modules": r".*(q|v)_proj", "layers": [0]}, "model.layers.0.self_attn.[qv]_proj"),
        ({"exclude_modules": ["mlp", "k_proj"]}, "model.layers.[01].self_attn.[qvo]_proj"),
        ({"exclude_modules": r".*(mlp|\.0)\..*"}, "model.layers.1.self_attn.[qkvo]_proj"),
        ({"target_modules": ["down_proj", "q_proj"], "exclude_modules": ["layers.0.mlp"]},
         "model.layers.(0.self_attn.q|1.(self_attn.q|mlp.down))_proj"),
    ],
)  # fmt: skip
def test_what_is_adapted(method: str, keys: dict[str, Any], expected: str) -> None:
    model = attach(tiny("llama"), MethodConfig(name=method, **{**KINDS[method], **keys}), seed=0, total_steps=9)
    assert adapted(model) == {name for name in LINEAR if re.fullmatch(expected, name)}


pieces = st.sampled_from(
    [".*", "layers", r"\.", "0", "1", "self_attn", "mlp", "(q|k)", "down", "_proj", "lm_head", "."]
)


@pytest.mark.filterwarnings("ignore:You have passed exclude_modules")
@settings(max_examples=30)
@given(st.lists(pieces, min_size=1, max_size=6).map("".join), st.booleans())
def test_an_expression_is_what_stock_peft_makes_of_it(pattern: str, excluded: bool) -> None:
    """Where stock PEFT takes it at all."""
    pattern = f"{pattern}()"  # whatever it is, it is an expression
    keys = {"exclude_modules": pattern} if excluded else {"target_modules": pattern}
    stock = LoraConfig(r=1, **{"target_modules": ["q_proj", "down_proj"], **keys})
    with torch.device("meta"):
        base, other = tiny("llama"), tiny("llama")
    try:
        wrapped = get_peft_model(base, stock)
    except ValueError:
        wrapped = None
    method = MethodConfig(r=1, **{"target_modules": ["q_proj", "down_proj"], **keys})
    try:
        found = set(chosen_modules(other, method)[0])
    except ConfigError:
        found = set()
    if wrapped is not None and (not excluded or found):
        assert found == adapted(wrapped)
    elif not excluded:
        assert not found


def test_a_mixture_is_not_widened(tmp_path: Any) -> None:
    """Stock PEFT makes bare names of an expression on a mixture, and adapts all layers."""
    pattern = r".*layers\.1\..*q_proj"
    stock = get_peft_model(mixture("qwen3_moe"), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=pattern))
    assert len(adapted(stock)) == 2
    model = attach(mixture("qwen3_moe"), MethodConfig(r=2, target_modules=pattern), seed=0)
    assert adapted(model) == {"model.layers.1.self_attn.q_proj"}
    save_adapter(model, tmp_path, trainable_parameters(model))
    again = PeftModel.from_pretrained(mixture("qwen3_moe"), str(tmp_path), is_trainable=True)
    assert adapted(again) == adapted(model)


@pytest.mark.parametrize(
    ("name", "keys", "said"),
    [
        ("llama", {"target_modules": ".*query"}, r"matches no whole name .*model\.layers\.N\.mlp\.down_proj.*such as"),
        ("llama", {"target_modules": ".*self_attn.*"}, r"also matches what takes no.*: model.layers.N.self_attn \(L"),
        ("llama", {"target_modules": ".*q_proj", "layers": [9]}, r"method\.layers=\[9\]: LlamaForCausalLM has 2"),
        ("llama", {"target_modules": r".*\.0\..*q_proj", "layers": [1]}, r"layers=\[1\]: leaves out all .*\[0\]"),
        ("llama", {"exclude_modules": ["kproj"]}, r"exclude_modules=kproj: leaves nothing out.*=\[k_proj\]"),
        ("llama", {"exclude_modules": ["mlp", "vision"]}, r"exclude_modules=vision: leaves nothing out"),
        ("llama", {"exclude_modules": ".*proj"}, r"exclude_modules=\.\*proj: leaves nothing of"),
        ("mixtral", {"target_modules": ".*gate()"}, "also matches what takes no adapter: .*MixtralTopKRouter"),
    ],
)  # fmt: skip
def test_what_is_refused(name: str, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        attach(tiny(name), MethodConfig(r=2, **keys), seed=0)


def test_names_that_peft_would_move_to_the_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"PEFT takes these names for the experts'.*target_parameters=experts"):
        attach(tiny("first layer dense"), MethodConfig(r=2, target_modules=r".*mlp\.down_proj"), seed=0)


def test_what_takes_an_adapter() -> None:
    assert is_target(nn.Linear(1, 1))
    assert is_target(nn.Embedding(1, 1))
    assert not is_target(nn.LayerNorm(1))
