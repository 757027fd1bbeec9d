"""Which models have a table of positions, and how long it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import OPTConfig, OPTForCausalLM

from tests.helpers.architectures import tiny
from trainer.models.positions import learned_positions, trained_positions


def opt() -> Any:
    keys = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    return OPTForCausalLM(OPTConfig(**keys, word_embed_proj_dim=16, max_position_embeddings=40))


@pytest.mark.parametrize("make", [lambda: tiny("gpt2"), opt], ids=["gpt2", "opt"])
def test_a_table_of_positions_has_an_end(make: Callable[[], Any]) -> None:
    model = make()
    assert learned_positions(model) == trained_positions(model) == model.config.max_position_embeddings


def test_rotary_positions_have_none() -> None:
    model = tiny("llama")
    assert learned_positions(model) is None
    assert trained_positions(model) == model.config.max_position_embeddings
