"""What DeepSpeed is told."""

from __future__ import annotations

import pytest
import torch

from trainer.config import load
from trainer.engine.deepspeed_config import PERSISTENT_ELEMENTS, deepspeed_config

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
