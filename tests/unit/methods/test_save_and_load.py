"""Adapters start from the seed, and read back from disk or are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.helpers.architectures import tiny
from trainer.config.schema import MethodConfig
from trainer.errors import CheckpointError
from trainer.methods import (
    attach,
    count_parameters,
    is_adapter,
    load_adapter,
    save_adapter,
    save_full,
    trainable_parameters,
    verify_adapter,
)
from trainer.methods.save import ADAPTER_FILE


def test_full_trains_everything(model: Any) -> None:
    attach(model, MethodConfig(name="full", r=None), seed=0)
    trained, total = count_parameters(model)
    assert trained == total == sum(p.numel() for p in model.parameters())


def test_the_start_is_drawn_from_the_seed_and_changes_nothing(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    def fresh(seed: int) -> Any:
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        torch.rand(seed + 3)  # what was drawn before does not matter
        return attach(base, MethodConfig(r=4, dropout=0.0), seed).eval()

    first, again, other = fresh(0), fresh(0), fresh(1)
    a, b, c = (trainable_parameters(m) for m in (first, again, other))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not any(torch.equal(a[n], c[n]) for n in a if "lora_A" in n)
    ids = torch.arange(20)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert torch.equal(first(input_ids=ids).logits, base(input_ids=ids).logits)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 2.0), (16.0, 4.0), (1.0, 0.25)])
def test_alpha_is_twice_the_rank_unless_given(model: Any, alpha: float | None, scale: float) -> None:
    wrapped = attach(model, MethodConfig(r=4, alpha=alpha, target_modules=["q_proj"]), seed=0)
    layer = wrapped.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == scale
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(5, 64)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(layer(x), layer.base_layer(x) + scale * x @ a.T @ b.T)


class Saved:
    """An adapter of the tiny model with a B that is not zero, on disk."""

    def __init__(self, model: Any, folder: Path, **keys: Any) -> None:
        self.model = attach(model, MethodConfig(**{"r": 4, **keys}), seed=0).eval()
        generator = torch.Generator().manual_seed(1)
        self.weights = {
            n: torch.randn(p.shape, generator=generator) for n, p in trainable_parameters(self.model).items()
        }
        for name, parameter in trainable_parameters(self.model).items():
            parameter.data.copy_(self.weights[name])
        self.folder, self.file = folder, folder / ADAPTER_FILE
        save_adapter(self.model, folder, self.weights)

    @property
    def expected(self) -> dict[str, Tensor]:
        return {n.replace(".default", ""): t for n, t in self.weights.items()}


@pytest.fixture
def saved(model: Any, tmp_path: Path) -> Saved:
    return Saved(model, tmp_path / "adapter")


def test_an_adapter_is_stock_and_gives_the_same_logits(saved: Saved, tiny_model: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(40).reshape(2, 20)
    live = saved.model(input_ids=ids).logits
    for loads in (PeftModel.from_pretrained, load_adapter):
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
        assert not torch.allclose(base(input_ids=ids).logits, live)
        assert torch.equal(loads(base, saved.folder).eval()(input_ids=ids).logits, live)
    assert is_adapter(saved.folder)
    assert set(load_file(saved.file)) == set(saved.expected)
    assert json.loads((saved.folder / "adapter_config.json").read_text())["lora_alpha"] == 8


def test_verify_finds_any_changed_byte(saved: Saved) -> None:
    verify_adapter(saved.folder, saved.expected)
    content = saved.file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for at in (0, 9, header // 2, header, header + 1, (header + len(content)) // 2, len(content) - 1):
        saved.file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(CheckpointError) as caught:
            verify_adapter(saved.folder, saved.expected)
        assert str(saved.folder) in str(caught.value)
    saved.file.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="cannot be read"):
        verify_adapter(saved.folder, saved.expected)


def test_verify_finds_missing_extra_and_misshapen_tensors(saved: Saved) -> None:
    tensors = load_file(saved.file)
    name = sorted(tensors)[3]
    for changed, reason in (
        ({n: t for n, t in tensors.items() if n != name}, "other tensors than meant"),
        ({**tensors, "odd": torch.ones(1)}, "other tensors than meant"),
        ({**tensors, name: tensors[name].T.contiguous()}, "does not read back"),
        ({**tensors, name: torch.zeros(0)}, "does not read back"),  # what a naive save under ZeRO-3 leaves
    ):
        save_file(changed, saved.file)
        with pytest.raises(CheckpointError, match=reason):
            verify_adapter(saved.folder, saved.expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(saved: Saved, tmp_path: Path, value: float) -> None:
    name = sorted(saved.weights)[0]
    saved.weights[name][0, 0] = value
    with pytest.raises(CheckpointError, match=r"lora_A.*not finite"):
        save_adapter(saved.model, tmp_path / "again", saved.weights)


@pytest.mark.parametrize(
    "base", [{"hidden_size": 32}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}, {"intermediate_size": 64}]
)
def test_another_base_is_refused(saved: Saved, base: dict[str, int]) -> None:
    """Also one that differs in its number of layers alone: PEFT would fill in or leave out adapters and only warn."""
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_config(type(saved.model.config)(**{**saved.model.config.to_dict(), **base}))
    with pytest.raises(CheckpointError, match=r"adapter: does not fit the base model .* → use its own base"):
        load_adapter(other, saved.folder)


def test_another_architecture_is_refused(saved: Saved) -> None:
    with pytest.raises(CheckpointError, match="does not fit the base model"):
        load_adapter(tiny("gpt2"), saved.folder)


def test_a_folder_without_adapter_and_a_torn_file_are_told(saved: Saved, model: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        load_adapter(model, tmp_path)
    saved.file.write_bytes(saved.file.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_adapter(model, saved.folder)
    saved.file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_adapter(model, saved.folder)


def test_a_full_model_reads_back_in_stock_transformers(model: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    weights = {n: t + 0.5 for n, t in model.state_dict().items()}
    save_full(model, tmp_path, weights)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert set(found) == set(weights)
    assert all(torch.equal(found[n], weights[n]) for n in weights)
