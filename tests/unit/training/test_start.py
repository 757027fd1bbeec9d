"""The start of a run on one screen: what is trained, on what, how, from the config and the model alike."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.config import load
from trainer.training.start import _method, _optimizer, values_taken

INFO = {
    "dtype": "bfloat16",
    "targets": ["q_proj", "v_proj"],
    "packing_taken": "trie",
    "kernels_taken": [],
}


def config(*overrides: str) -> Any:
    return load(["model=tiny", "data.path=hub/rows", *overrides], with_data=False)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ([], "LoRA, r=16, alpha=32 (2 * r), on q_proj v_proj"),
        (["method.r=8", "method.alpha=8", "method.dropout=0.1"], "LoRA, r=8, alpha=8, dropout=0.1, on q_proj v_proj"),
        (["method=qlora"], "LoRA, r=16, alpha=32 (2 * r), base in 4 bits (nf4), on q_proj v_proj"),
        (["method=dora"], "LoRA, r=16, alpha=32 (2 * r), dora, on q_proj v_proj"),
        (["method=adalora"], "AdaLoRA, init_r=12, alpha=24 (2 * init_r), target_r=8, on q_proj v_proj"),
        (["method=full"], "full fine-tuning"),
        (["method=prompt"], "prompt tuning, virtual_tokens=20"),
        (["method=bottleneck"], "bottleneck adapters, reduction_factor=16, placement=houlsby"),
    ],
)
def test_the_method(overrides: list[str], line: str) -> None:
    targets = INFO["targets"] if "on q_proj" in line else []
    assert ", ".join(_method(config(*overrides), targets)) == line


def test_the_rate_says_where_it_comes_from() -> None:
    assert ", ".join(_optimizer(config(), 100)) == (
        "AdamW, learning rate 0.0002 (LoRA's default), cosine after 3 warm-up steps, weight decay 0, "
        "gradient norm clipped at 1"
    )
    given = config("optim.learning_rate=1e-3", "schedule=constant", "optim.max_grad_norm=0")
    line = ", ".join(_optimizer(given, 100))
    assert "learning rate 0.001 (as given)" in line
    assert line.endswith("gradient norm not clipped")


def test_what_null_auto_and_short_names_stand_for() -> None:
    assert values_taken(config(), INFO, 100) == {
        "optim.learning_rate": 2e-4,
        "method.alpha": 32,
        "schedule.warmup_steps": 3,
        "batch.max_steps": 100,
        "model.dtype": "bf16",
        "batch.packing": "trie",
        "model.kernels": "none",
        "method.target_modules": ["q_proj", "v_proj"],
    }
    typed = ["optim.learning_rate=1e-3", "method.alpha=4", "schedule.warmup_steps=1", "batch.max_steps=7"]
    typed += ["model.dtype=fp32", "batch.packing=padded", "model.kernels=none", "method.target_modules=[q_proj]"]
    assert values_taken(config(*typed), INFO, 7) == {}
