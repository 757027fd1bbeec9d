"""What DeepSpeed is told."""

from __future__ import annotations

import pytest
import torch

from trainer.config import load
from trainer.engine.deepspeed_config import PERSISTENT_ELEMENTS, deepspeed_config
from trainer.engine.zero_engine import largest_kept

THRESHOLD = "stage3_param_persistence_threshold"


@pytest.mark.parametrize(
    ("zero", "largest_adapter", "expected"),
    [
        ("stage3", PERSISTENT_ELEMENTS + 1, PERSISTENT_ELEMENTS + 1),
        ("stage3_offload", 229_376, 229_376),  # r=16 on the MLP of an 8B
        ("stage3", 4096, None),  # DeepSpeed keeps such tensors whole by itself
        ("stage3", 0, None),  # all weights are trained
        ("stage2", 229_376, None),
    ],
)
def test_adapters_stay_whole_under_zero_3(zero: str, largest_adapter: int, expected: int | None) -> None:
    found = deepspeed_config(load(["debug=tiny", f"zero={zero}"]), torch.bfloat16, 2, largest_adapter)
    assert found["zero_optimization"].get(THRESHOLD) == expected


def test_a_threshold_of_ones_own_wins() -> None:
    config = load(["debug=tiny", "zero=stage3", f"zero.extra={{zero_optimization:{{{THRESHOLD}:7}}}}"])
    assert deepspeed_config(config, torch.bfloat16, 2, 229_376)["zero_optimization"][THRESHOLD] == 7


def test_a_module_that_is_trained_whole_does_not_keep_the_base_whole() -> None:
    model = torch.nn.ModuleDict({"lora_A": torch.nn.Linear(8, 2, bias=False)})
    model["modules_to_save"] = torch.nn.ModuleDict({"default": torch.nn.Embedding(100, 8)})
    assert largest_kept(torch.nn.ModuleDict({"base": model})) == 16
    assert largest_kept(torch.nn.ModuleDict()) == 0
