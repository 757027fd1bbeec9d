"""Models whose layers carry a state: padding, packing, answers, and the methods that do not adapt linear layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.architecture_table import DENSE, RECURRENT, recurrent
from tests.helpers.architectures import VOCABULARY, random_model
from trainer.config import load
from trainer.data.batching.micro_batch import Tokens, collate_padded
from trainer.engine.trie_obstacle import trie_obstacle
from trainer.engine.verification import distances, loss_and_gradients
from trainer.errors import ConfigError
from trainer.kernels.label_loss import LabelLoss
from trainer.methods import attach, trainable_parameters
from trainer.methods.recurrent import recurrent_layers

RNG = np.random.default_rng(0)
ROWS = [Tokens(RNG.integers(2, VOCABULARY, n).astype(np.int32), np.arange(n) >= 2) for n in (11, 6, 8)]
BOUND = 1e-4  # of rounding Zamba2 has 5e-5; what reads padding is beyond 1e-2
METHODS = {
    "lora": ["method=lora"],
    "dora": ["method=dora"],
    "adalora": ["method=adalora"],
    "ia3": ["method=ia3"],
    "bottleneck": ["method=bottleneck", "method.reduction_factor=4"],
    "prompt": ["method=prompt"],
    "prefix": ["method=prefix"],
}
NO_KNOWN_END = {"mamba", "falcon_mamba", "mamba2", "nemotron_h", "recurrent_gemma", "qwen3_next"}
REFUSED = {
    **{(name, "bottleneck"): r"method\.placement=houlsby: finds none of" for name in NO_KNOWN_END},
    **{(name, "prompt"): r"method\.name=prompt: is refused by PEFT for \w+" for name in ("mamba", "falcon_mamba")},
    **{(name, "prefix"): r"method\.name=prefix: .* have a state in the place of keys" for name in RECURRENT},
}


def adapted(name: str, method: str) -> Any:
    """A model with adapters that do something."""
    torch.manual_seed(0)
    model = attach(recurrent(name), load(["debug=tiny", *METHODS[method]]).method, seed=0, total_steps=50)
    for parameter in trainable_parameters(model).values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("name", RECURRENT)
def test_padded_rows_are_each_row_alone(name: str) -> None:
    """Loss and gradients, by every method that is not refused."""
    for method in METHODS:
        if (name, method) in REFUSED:
            with pytest.raises(ConfigError, match=REFUSED[name, method]):
                adapted(name, method)
            continue
        model = adapted(name, method)
        loss, parameters = LabelLoss(model), list(trainable_parameters(model).values())
        padded = loss_and_gradients(model, loss, [collate_padded(ROWS, range(3), 0)], parameters)
        alone = loss_and_gradients(model, loss, [collate_padded([row], [0], 0) for row in ROWS], parameters)
        assert max(distances(padded, alone)) < BOUND, method
        assert all(gradient.any() for gradient in alone[1]), method


@pytest.mark.parametrize("name", RECURRENT)
def test_a_state_is_found_and_has_no_tree(name: str) -> None:
    with torch.device("meta"):
        model = random_model(RECURRENT[name])
    assert recurrent_layers(model)
    assert "carry a state from token to token" in (trie_obstacle(model) or "")


def test_attention_alone_has_no_state() -> None:
    for row in DENSE.values():
        with torch.device("meta"):
            assert recurrent_layers(random_model(row)) is None
