"""Which models have a table of positions, and how long it is."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import OPTConfig, OPTForCausalLM

from tests.helpers.architectures import tiny
from tests.helpers.logged import logged_lines
from trainer.config import load
from trainer.errors import ConfigError
from trainer.models.positions import learned_positions, trained_positions
from trainer.training.build import check_rows


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


@pytest.mark.parametrize(("name", "refused"), [("gpt2", True), ("llama", False)])
def test_a_row_behind_the_last_position(name: str, refused: bool) -> None:
    model = tiny(name)
    limit = model.config.max_position_embeddings

    class Rows:
        lengths = np.array([3, limit + 1])

        def __len__(self) -> int:
            return len(self.lengths)

        def names(self, which: list[int]) -> list[str]:
            return [f"rows.jsonl:{i + 1}" for i in which]

    data: Any = SimpleNamespace(train=Rows(), validation=[])
    if refused:
        with pytest.raises(ConfigError, match=rf"rows.jsonl:2.*{limit + 1} tokens.*data.max_length={limit}"):
            check_rows(model, data, load(["debug=tiny"]))
        return
    with logged_lines() as logged:
        check_rows(model, data, load(["debug=tiny"]))
    assert [line for line in logged if f"rows.jsonl:2 has {limit + 1} tokens" in line]
