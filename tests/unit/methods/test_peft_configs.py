"""Every method: what it trains, and that what is saved is what was trained, in stock PEFT's hands too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.architectures import tiny
from trainer.config.method import METHODS, MethodConfig
from trainer.config.rules.method import adalora_times
from trainer.config.suggestions import config_fields
from trainer.errors import CheckpointError, ConfigError
from trainer.methods import (
    attach,
    load_adapter,
    save_adapter,
    trainable_parameters,
)
from trainer.methods.adalora import OrthogonalTerm, RankAllocator, orthogonal_gradient
from trainer.methods.initial_weights import copy_initial_weights

ADALORA: dict[str, Any] = METHODS["adalora"].needs
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "lora, biases": {"r": 4, "bias": "lora_only"},
    "lora, two layers": {"r": 4, "layers": [1]},
    "lora, patterns": {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3.0}},
    "rslora": {"r": 4, "rslora": True, "alpha": 3.0},
    "dora": {"r": 4, "dora": True},
    "gaussian": {"r": 4, "init": "gaussian"},
    "orthogonal": {"r": 4, "init": "orthogonal"},
    "pissa": {"r": 4, "init": "pissa"},
    "pissa, rslora": {"r": 4, "init": "pissa", "rslora": True},
    "olora": {"r": 4, "init": "olora"},
    "adalora": {"name": "adalora", **ADALORA, "init_r": 6, "target_r": 3},
    "ia3": {"name": "ia3"},
    "ia3, one layer": {"name": "ia3", "layers": [0], "target_modules": ["k_proj", "v_proj", "down_proj"]},
    "prompt": {"name": "prompt", "virtual_tokens": 3},
    "prompt, vocabulary": {"name": "prompt", "virtual_tokens": 3, "init": "vocab"},
    "prefix": {"name": "prefix", "virtual_tokens": 3, "prefix_projection": False},
    "prefix, zero": {"name": "prefix", "virtual_tokens": 3, "prefix_projection": False, "init": "zero"},
    "prefix, projected": {"name": "prefix", "virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 7},
    "bottleneck": {"name": "bottleneck", "reduction_factor": 4, "placement": "houlsby", "activation": "relu"},
    "bottleneck, pfeiffer": {
        "name": "bottleneck",
        "reduction_factor": 3,
        "placement": "pfeiffer",
        "activation": "gelu",
        "layers": [1],
    },
}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


def base() -> Any:
    torch.manual_seed(1)
    return tiny("llama").eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits[:, -IDS.shape[1] :]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> MethodConfig:
    return MethodConfig(**KINDS[request.param])


def trained_model(kind: MethodConfig) -> tuple[Any, dict[str, Tensor]]:
    """A model some steps after its start, and the initial weights that its adapters took out of the base."""
    model = attach(base(), kind, seed=0, total_steps=10)
    start = copy_initial_weights(model, kind)
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-2)
    for _ in range(3):
        out = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits
        torch.nn.functional.cross_entropy(out[:, -len(IDS[0]) :].flatten(0, 1), IDS.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, start


def test_what_is_saved_is_what_was_trained(kind: MethodConfig, tmp_path: Path) -> None:
    model, start = trained_model(kind)
    expected = logits(model)
    assert float((expected - logits(base())).abs().max()) > 1e-3, "training changed nothing"
    save_adapter(model, tmp_path, {n: p.detach() for n, p in trainable_parameters(model).items()}, start)
    found = logits(load_adapter(base(), tmp_path).eval())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if kind.name != "bottleneck":
        stock = PeftModel.from_pretrained(base(), str(tmp_path)).eval()
        torch.testing.assert_close(logits(stock), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in KINDS if name.split(",")[0] not in ("pissa", "olora")])
def test_the_base_is_frozen(name: str) -> None:
    kind = MethodConfig(**{**KINDS[name], "bias": "none"})
    untouched, (model, _) = base(), trained_model(kind)
    mine = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if not p.requires_grad}
    for full, parameter in untouched.named_parameters():
        held = next(p for other, p in mine.items() if other.endswith(full))
        assert torch.equal(held, parameter), full


def adalora_model(total_steps: int = 10, **keys: Any) -> Any:
    kind = MethodConfig(**{**KINDS["adalora"], "target_modules": ["q_proj", "v_proj"], **keys})
    return attach(base(), kind, seed=0, total_steps=total_steps)


@pytest.mark.parametrize("times", [{"tinit": 2, "tfinal": 3, "deltaT": 1}, {"tinit": 0, "tfinal": 0, "deltaT": 2}, {}])
def test_ranks_are_taken_as_peft_takes_them(times: dict[str, int]) -> None:
    """Against stock PEFT's own allocator on the same model, gradients and updates."""
    mine, stock = adalora_model(20, **times), adalora_model(20, **times)
    allocator = RankAllocator.from_peft(mine.peft_config["default"], 2 * 2)
    rates = torch.Generator().manual_seed(5)
    seen = set()
    for step in range(1, 21):
        gradients = {n: torch.randn(p.shape, generator=rates) for n, p in trainable_parameters(mine).items()}
        for model in (mine, stock):
            for name, parameter in trainable_parameters(model).items():
                parameter.grad = gradients[name].clone()
                parameter.data -= 0.05 * parameter.grad
        stock.base_model.update_and_allocate(step)
        for name, parameter in trainable_parameters(mine).items():
            if allocator.observes(step):
                allocator.observe(name, parameter.detach(), gradients[name])
        for name, kept in allocator.masks(step).items():
            trainable_parameters(mine)[name].data.masked_fill_(~kept, 0.0)
        allocator.finish(step)
        for (name, one), other in zip(
            trainable_parameters(mine).items(), trainable_parameters(stock).values(), strict=True
        ):
            assert torch.equal(one, other), (step, name)
        seen.add(tuple(int(k.sum()) for k in allocator.kept.values()))
    assert sum(int(k.sum()) for k in allocator.kept.values()) == 4 * 3
    assert len(seen) > 3, "ranks hardly moved"


def test_the_orthogonal_gradient_is_autograds() -> None:
    rows = torch.randn(3, 8, requires_grad=True)
    (rows @ rows.T - torch.eye(3)).norm().backward()
    assert rows.grad is not None
    torch.testing.assert_close(orthogonal_gradient(rows.detach()), rows.grad)


def test_the_orthogonal_term_enters_once_and_as_stock_peft_adds_it() -> None:
    inputs = {"input_ids": IDS, "labels": IDS}
    stock = adalora_model(orth_reg_weight=0.3)
    for name, parameter in trainable_parameters(stock).items():
        if "lora_E" in name:
            parameter.data.normal_()
    mine = adalora_model(orth_reg_weight=0.3)
    mine.load_state_dict(stock.state_dict())
    stock(**inputs).loss.backward()
    term = OrthogonalTerm(mine, 0.3)
    for scale in (0.0, 1.0, 0.0):  # as of three micro-batches, of which one carries it
        term.scale = scale
        out = mine.get_base_model()(**inputs).loss  # without stock PEFT's own term
        (out / 3).backward()
    expected = {n: p.grad for n, p in trainable_parameters(stock).items()}
    for name, parameter in trainable_parameters(mine).items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-7)


def test_times_follow_from_the_run() -> None:
    kind = MethodConfig(name="adalora", **ADALORA)
    assert adalora_times(kind, 1000) == (100, 300, 30)
    assert adalora_times(kind, 3) == (0, 0, 1)
    for wrong in ({"tinit": 6, "tfinal": 4}, {"deltaT": 8}, {"tfinal": 10}):
        with pytest.raises(ConfigError, match=r"10 %|no taking of ranks"):
            adalora_times(MethodConfig(name="adalora", **ADALORA, **wrong), 10)


def test_a_saved_adapter_has_the_ranks_that_are_left(tmp_path: Path) -> None:
    model = adalora_model()
    for name, parameter in trainable_parameters(model).items():
        if "lora_E" in name:
            parameter.data.normal_()
            parameter.data[::2] = 0
    kept = {
        name.removeprefix("base_model.model."): parameter.ne(0).flatten().tolist()
        for name, parameter in trainable_parameters(model).items()
        if "lora_E" in name
    }
    model.peft_config["default"].rank_pattern = kept
    expected = logits(model)
    save_adapter(model, tmp_path, {n: p.detach() for n, p in trainable_parameters(model).items()})
    saved = load_file(str(tmp_path / "adapter_model.safetensors"))
    shapes = {tuple(t.shape) for n, t in saved.items() if "lora_E" in n}
    assert shapes == {(3, 1)}
    for loaded in (load_adapter(base(), tmp_path), PeftModel.from_pretrained(base(), str(tmp_path))):
        torch.testing.assert_close(logits(loaded.eval()), expected, rtol=1e-4, atol=1e-5)


def test_words_start_a_prompt() -> None:
    kind = MethodConfig(name="prompt", virtual_tokens=5, init="text", init_text="x")
    model = attach(base(), kind, seed=0, text_ids=[7, 8])
    expected = base().get_input_embeddings().weight[[7, 8, 7, 8, 7]]
    torch.testing.assert_close(model.prompt_encoder["default"].embedding.weight, expected)


def test_an_adapter_of_another_place_is_refused(tmp_path: Path) -> None:
    model, _ = trained_model(MethodConfig(**KINDS["bottleneck"]))
    weights = {n: p.detach() for n, p in trainable_parameters(model).items()}
    save_adapter(model, tmp_path, weights)
    metadata = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**metadata, "placement": "pfeiffer"}))
    with pytest.raises(CheckpointError, match="does not fit"):
        load_adapter(base(), tmp_path)


def test_a_layer_that_is_not_there_is_refused() -> None:
    for keys in (KINDS["lora"], KINDS["ia3"], KINDS["bottleneck"]):
        with pytest.raises(ConfigError, match="has 2 layers"):
            attach(base(), MethodConfig(**{**keys, "layers": [2]}), seed=0)


def test_what_adalora_trains_on_a_16_bit_base() -> None:
    """There stock PEFT lets the divisor of the scale be trained too, which it never saves."""
    kind = MethodConfig(**{**KINDS["adalora"], "target_modules": ["q_proj"]})
    model = attach(base().to(torch.bfloat16), kind, seed=0, total_steps=10)
    assert {name.split(".")[-2] for name in trainable_parameters(model)} == {"lora_A", "lora_B", "lora_E"}


def test_every_activation_of_the_schema_is_one() -> None:
    for name in config_fields()["method.activation"].field.metadata["choices"]:
        model = attach(base(), MethodConfig(**{**KINDS["bottleneck"], "activation": name}), seed=0)
        assert torch.isfinite(logits(model)).all()
