"""Trained parameters of Llama-2-7B, as README corrects what is often quoted. On the meta device: nothing is loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.architectures import llama_2_7b
from trainer.config import load
from trainer.methods import attach, count_parameters

WEIGHTS = 6_738_415_616


@pytest.fixture(scope="module")
def base() -> Any:
    return llama_2_7b()


@pytest.mark.parametrize(
    ("overrides", "trained"),
    [
        (["method.r=16", "method.target_modules=attention"], 16_777_216),
        (["method.r=16", "method.target_modules=attention_min"], 8_388_608),
        (["method.r=8", "method.target_modules=attention_min"], 4_194_304),
        (["method.r=16"], 39_976_960),
    ],
)
def test_trained_parameters_of_llama_2_7b(base: Any, overrides: list[str], trained: int) -> None:
    with torch.device("meta"):
        model = attach(base, load(overrides).method, seed=0)
    assert count_parameters(model) == (trained, WEIGHTS + trained)
    model.unload()
