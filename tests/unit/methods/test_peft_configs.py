"""Every method: what it trains, and that what is saved is what was trained, in stock PEFT's hands too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from tests.helpers.adapters import KINDS, base, logits, trained_model
from trainer.config.method import MethodConfig
from trainer.config.suggestions import config_fields
from trainer.errors import CheckpointError, ConfigError
from trainer.methods import (
    attach,
    load_adapter,
    save_adapter,
    trainable_parameters,
)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> MethodConfig:
    return MethodConfig(**KINDS[request.param])


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


def test_every_activation_of_the_schema_is_one() -> None:
    for name in config_fields()["method.activation"].field.metadata["choices"]:
        model = attach(base(), MethodConfig(**{**KINDS["bottleneck"], "activation": name}), seed=0)
        assert torch.isfinite(logits(model)).all()
