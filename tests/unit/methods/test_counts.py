"""Trained parameters of Llama-2-7B, as README corrects what is often quoted. On the meta device: nothing is loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.config import load
from trainer.methods import attach, count_parameters

WEIGHTS = 6_738_415_616


@pytest.fixture(scope="module")
def llama2_7b() -> Any:
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("overrides", "trained"),
    [
        (["method.r=16", "method.target_modules=attention"], 16_777_216),
        (["method.r=16", "method.target_modules=attention_min"], 8_388_608),
        (["method.r=8", "method.target_modules=attention_min"], 4_194_304),
        (["method.r=16"], 39_976_960),
    ],
)
def test_trained_parameters_of_llama_2_7b(llama2_7b: Any, overrides: list[str], trained: int) -> None:
    with torch.device("meta"):
        model = attach(llama2_7b, load(overrides).method, seed=0)
    assert count_parameters(model) == (trained, WEIGHTS + trained)
    model.unload()


def test_its_weights_in_16_bits_are_more_than_12_gb(llama2_7b: Any) -> None:
    assert count_parameters(llama2_7b)[1] * 2 / 1e9 == pytest.approx(13.48, abs=0.01)
