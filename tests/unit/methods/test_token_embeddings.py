"""Embeddings trained beside LoRA, against stock PEFT: loss and gradients, the saved adapter, what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from tests.helpers.architectures import tiny
from tests.unit.kernels.test_label_loss import padded, random_rows, stock_loss_and_gradients
from trainer.config.method import MethodConfig
from trainer.errors import ConfigError
from trainer.kernels.label_loss import LabelLoss
from trainer.merge.fold import fold
from trainer.methods import AdapterSwitcher, attach, save_adapter, trainable_parameters
from trainer.methods.token_embeddings import check_new_rows, is_tied

TOKENS, MODULES = [7, 11, 380], ["embed_tokens", "lm_head"]
ROWS = random_rows([5, 12, 1, 9])
ROWS[0]["input_ids"][2:4] = [7, 11]


def base(name: str = "llama", tied: bool = False, **changes: Any) -> Any:
    torch.manual_seed(1)
    model = tiny(name, vocab_size=384, tie_word_embeddings=tied, **changes).eval()
    if model.get_output_embeddings().bias is not None:
        torch.nn.init.ones_(model.get_output_embeddings().bias)
    return model


def config(way: str, **keys: Any) -> MethodConfig:
    way_keys: dict[str, Any] = {"tokens": {"trainable_tokens": ["a"]}, "modules": {"modules_to_save": MODULES}}[way]
    return MethodConfig(**{"r": 4, **way_keys, **keys})


def attached(model: Any, method: MethodConfig) -> Any:
    out = attach(model, method, seed=0, token_ids=TOKENS if method.trainable_tokens else None)
    check_new_rows(out, method)
    return out


def stock(model: Any, way: str) -> Any:
    tied = is_tied(model)
    keys: dict[str, Any] = {"modules_to_save": list(MODULES), "ensure_weight_tying": tied}
    if way == "tokens":
        keys = {"trainable_token_indices": TOKENS if tied else {"embed_tokens": TOKENS, "lm_head": TOKENS}}
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    torch.manual_seed(0)
    peft = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=linear, **keys)
    return get_peft_model(model, peft)


def moved(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def save(model: Any, folder: Path) -> Path:
    save_adapter(model, folder, {n: p.detach() for n, p in trainable_parameters(model).items()})
    return folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 7, 11, 380, 9]])).logits


WAYS = pytest.mark.parametrize(
    ("way", "tied"), [(way, tied) for way in ("tokens", "modules") for tied in (False, True)]
)


@WAYS
@pytest.mark.parametrize("chunk", [None, 384 * 3])
def test_loss_and_gradients_are_stock_pefts(way: str, tied: bool, chunk: int | None) -> None:
    """Of few labels and of many, which the output layer meets in chunks: through PEFT's wrapper each time."""
    model, other = moved(attached(base(tied=tied), config(way))), moved(stock(base(tied=tied), way))
    assert list(trainable_parameters(model)) == list(trainable_parameters(other))
    expected, gradients = stock_loss_and_gradients(other, ROWS)
    found = LabelLoss(model, chunk)(model, padded(ROWS, range(len(ROWS)), 0))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    found.backward()
    for name, parameter in trainable_parameters(model).items():
        assert float((parameter.grad - gradients[name]).norm()) <= 2e-5 * float(gradients[name].norm()) + 1e-6, name


@WAYS
def test_the_saved_adapter_is_stock_pefts_and_the_base_is_what_it_was_without_it(
    way: str, tied: bool, tmp_path: Path
) -> None:
    model = moved(attached(base(tied=tied), config(way))).eval()
    expected, folder = logits(model), save(model, tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(tied=tied), folder).eval()), expected)
    plain = base(tied=tied)
    alone, names = logits(plain), list(plain.state_dict())
    switch = AdapterSwitcher(plain, {"own": folder, "base": None})
    for _ in range(2):
        assert torch.equal(logits(switch.use("own")), expected)
        assert torch.equal(logits(switch.use("base")), alone)
    assert list(plain.state_dict()) == names
    again = attached(base(tied=tied), config(way, adapter=str(folder))).eval()
    assert torch.equal(logits(again), expected), "a warm start"
    with pytest.raises(ConfigError, match=r"method\.(trainable_tokens|modules_to_save)"):
        attach(base(tied=tied), MethodConfig(r=4, adapter=str(folder)), seed=0)


@WAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_they_do_what_they_did(way: str, tied: bool, dtype: torch.dtype) -> None:
    model = moved(attached(base(tied=tied).to(dtype), config(way))).eval()
    expected = logits(model).float()
    folded, _ = fold(model)
    assert is_tied(folded) == tied
    far = float((logits(folded).float() - expected).norm() / expected.norm())
    assert far <= (1e-5 if dtype == torch.float32 else 3e-2)


def test_scaled_embeddings_stay_scaled_and_gpt2s_tied_ones_tied() -> None:
    for name in ("gemma2", "gemma3", "gpt2"):
        model = attached(base(name, tied=True), config("tokens"))
        assert any("token_adapter" in n for n in trainable_parameters(model)), name


@pytest.mark.parametrize(
    ("model", "method", "said"),
    [
        (lambda: base("phi"), config("tokens"), "would change what Linear does before it is trained"),
        (lambda: base("gpt2", tied=True), config("modules", modules_to_save=["wte"]), "would part the output layer"),
        (base, config("modules", modules_to_save=["embed_tokens"]), "leaves the output embeddings of new tokens"),
        (base, config("modules", modules_to_save=["embed_tokens", "lm_haed"]), "is no module of LlamaForCausalLM"),
        (base, config("tokens", modules_to_save=["lm_head"]), "rows of lm_head, which method.modules_to_save has"),
        (base, config("tokens", target_modules=["q_proj", "embed_tokens"]), "which method.target_modules has trained"),
    ],
)
def test_what_would_go_wrong_in_silence_is_refused(model: Any, method: MethodConfig, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        attached(model(), copy.copy(method))
