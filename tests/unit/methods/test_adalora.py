"""AdaLoRA: ranks are taken, and the orthogonal term added, as stock PEFT does it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.helpers.adapters import ADALORA, IDS, KINDS, adalora_model, base, logits
from trainer.config.method import MethodConfig
from trainer.config.rules.method import adalora_times
from trainer.errors import ConfigError
from trainer.methods import attach, load_adapter, save_adapter, trainable_parameters
from trainer.methods.adalora import OrthogonalTerm, RankAllocator, orthogonal_gradient


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


def test_what_adalora_trains_on_a_16_bit_base() -> None:
    """There stock PEFT lets the divisor of the scale be trained too, which it never saves."""
    kind = MethodConfig(**{**KINDS["adalora"], "target_modules": ["q_proj"]})
    model = attach(base().to(torch.bfloat16), kind, seed=0, total_steps=10)
    assert {name.split(".")[-2] for name in trainable_parameters(model)} == {"lora_A", "lora_B", "lora_E"}
