"""Multimodal wrappers: what is trained, counted and looked at is the text part, whatever stands beside it."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from tests.helpers.architectures import tiny
from tests.helpers.wrappers import WRAPPERS, tiny_wrapper
from trainer.config.method import MethodConfig
from trainer.engine.flops import count_flops
from trainer.errors import ConfigError
from trainer.methods import attach, count_parameters, load_adapter, save_adapter, trainable_parameters
from trainer.methods.targets import down_names, expert_parameters, target_names
from trainer.methods.text_part import describe_frozen_parts, other_parts, text_modules, text_parameters
from trainer.models.first_layers import find_decoder_layers
from trainer.models.positions import learned_positions

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 3, 4, 2, 11], [11, 12, 13, 14, 15, 16, 20, 21, 22, 23]])
TEXT = re.compile(r"(^|\.)(language_model|text_model|lm_head)\.")
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "lora in a layer": {"r": 4, "layers": [1]},
    "biases": {"r": 4, "bias": "lora_only"},
    "adalora": {"name": "adalora", "init_r": 6, "target_r": 3, "beta1": 0.85, "beta2": 0.85, "orth_reg_weight": 0.5},
    "ia3": {"name": "ia3"},
    "ia3 in a layer": {"name": "ia3", "layers": [0]},
    "bottleneck": {"name": "bottleneck", "reduction_factor": 4, "placement": "houlsby", "activation": "relu"},
    "prompt": {"name": "prompt", "virtual_tokens": 3},
    "prefix": {"name": "prefix", "virtual_tokens": 3, "prefix_projection": False},
}
FOUR = ("gemma3 wrapper", "llama4 wrapper", "qwen3_5 wrapper", "smolvlm wrapper")
REFUSED = {
    ("llama4 wrapper", "prompt"): r"method\.name=prompt: .*PEFT looks for the word embeddings in the tower",
    ("gemma4 wrapper", "prompt"): r"method\.name=prompt: .*a virtual token has no id",
    ("qwen2_5_vl wrapper", "prompt"): r"method\.name=prompt: .*its positions have three dimensions",
    ("qwen3_5 wrapper", "prompt"): r"method\.name=prompt: .*its positions have three dimensions",
    ("qwen3_5 wrapper", "prefix"): r"method\.name=prefix: .*its positions have three dimensions",
}


def seeded(name: str, **changes: Any) -> Any:
    torch.manual_seed(1)
    return tiny_wrapper(name, **changes).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits[:, -IDS.shape[1] :]


@pytest.mark.parametrize("name", WRAPPERS)
def test_named_sets_mean_layers_of_the_text_part(name: str) -> None:
    model, row = seeded(name), WRAPPERS[name]
    assert set(target_names(model, "attention_min")) == row.query_value
    assert set(target_names(model, "attention")) == row.attention
    assert set(target_names(model, "all_linear")) == row.linear
    assert down_names(model, sorted(row.linear)) == [row.down]
    layer = next(full for full, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not TEXT.search(full))
    with pytest.raises(ConfigError, match=r"takes no adapters"):
        target_names(model, [layer])


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_text_part_is_what_a_row_of_text_runs_through(name: str) -> None:
    model = seeded(name)
    model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS, use_cache=False).loss.backward()
    own = text_parameters(model)
    assert {full for full, p in model.named_parameters() if p.grad is not None} <= own.keys()
    assert all(TEXT.search(full) for full in own)
    towers = {id(p) for part in other_parts(model).values() for p in part.parameters()}
    assert {id(p) for p in model.parameters()} - {id(p) for p in own.values()} == towers
    assert all(part.rpartition(".")[2] in (describe_frozen_parts(model) or "") for part in other_parts(model))
    assert all("experts" in full for full in expert_parameters(model))
    assert learned_positions(model) is None  # the vision tower's table is no limit of rows
    assert {id(m) for m in find_decoder_layers(model)[2]} <= {id(m) for _, m in text_modules(model)}  # type: ignore[index]


@pytest.mark.parametrize(("name", "kind"), [pair for pair in itertools.product(FOUR, METHODS) if pair not in REFUSED])
def test_every_tensor_of_an_adapter_gets_a_gradient(name: str, kind: str, tmp_path: Any) -> None:
    """And it is saved; stock PEFT reads it with nothing missing or left over, and answers alike."""
    method = MethodConfig(**METHODS[kind])
    model = attach(seeded(name), method, seed=0, total_steps=30).train()
    trained = trainable_parameters(model)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS, use_cache=False).loss.backward()
    assert trained
    assert not [full for full, p in trained.items() if p.grad is None or not p.grad.any()]
    save_adapter(model, tmp_path, trained)  # type: ignore[arg-type]
    expected = logits(model.eval())
    torch.testing.assert_close(logits(load_adapter(seeded(name), tmp_path).eval()), expected, rtol=1e-5, atol=1e-5)
    if kind != "bottleneck":
        stock = PeftModel.from_pretrained(seeded(name), str(tmp_path)).eval()
        torch.testing.assert_close(logits(stock), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "kind"), REFUSED)
def test_what_a_wrapper_cannot_do_is_refused(name: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=REFUSED[name, kind]):
        attach(seeded(name), MethodConfig(**METHODS[kind]), seed=0)


def test_a_prefix_needs_layers_with_keys() -> None:
    torch.manual_seed(1)
    text = transformers.AutoModelForCausalLM.from_config(seeded("qwen3_5 wrapper").config)
    with pytest.raises(ConfigError, match=r"method\.name=prefix: .* have a state in the place of keys"):
        attach(text, MethodConfig(**METHODS["prefix"]), seed=0)


@pytest.mark.parametrize("name", ["gemma3 wrapper", "llama4 wrapper"])
def test_full_fine_tuning_trains_the_text_part_alone(name: str) -> None:
    model = seeded(name)
    whole = count_parameters(model)[1]
    attach(model, MethodConfig(name="full"), seed=0)
    trained, total = count_parameters(model)
    assert total == whole == trained + sum(p.numel() for part in other_parts(model).values() for p in part.parameters())
    assert {full for full, _ in trainable_parameters(model).items()} == text_parameters(model).keys()


def test_biases_of_a_tower_cannot_be_trained() -> None:
    with pytest.raises(ConfigError, match=r"method\.bias=all: takes in the biases of model\.vision_tower"):
        attach(seeded("gemma3 wrapper"), MethodConfig(r=4, bias="all"), seed=0)


def test_a_wrapper_costs_what_its_text_part_costs() -> None:
    keys = {"vocab_size": 44, "tie_word_embeddings": False}
    alone = tiny("mistral, window 8", head_dim=8, **keys)
    assert count_flops(seeded("mistral3 wrapper", sliding_window=8, **keys)) == count_flops(alone)


def test_a_model_without_towers_is_its_own_text_part() -> None:
    model = tiny("llama")
    assert dict(text_modules(model)) == dict(model.named_modules())
    assert text_parameters(model).keys() == dict(model.named_parameters()).keys()
    assert other_parts(model) == {}
    assert describe_frozen_parts(model) is None
    assert attach(model, MethodConfig(r=4), seed=0).peft_config["default"].exclude_modules is None  # type: ignore
