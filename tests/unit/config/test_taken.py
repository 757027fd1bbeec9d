"""A run's config.yaml keeps what its nulls stood for, and repeats them where a later version would take others."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.config import load, to_yaml
from trainer.config.method import METHODS
from trainer.config.taken import default_values

KEYS = ["model=tiny", "data.path=hub/rows"]


def write(folder: Path, taken: dict[str, object], *overrides: str) -> Path:
    file = folder / "config.yaml"
    file.write_text(to_yaml(load([*KEYS, *overrides], with_data=False), taken))
    return file


@pytest.mark.parametrize("method", [*METHODS, "qlora", "dora"])
def test_this_version_reads_back_what_was_typed(method: str, tmp_path: Path) -> None:
    config = load([*KEYS, f"method={method}"], with_data=False)
    taken = {**default_values(config), "model.dtype": "fp32", "model.kernels": ["rms_norm"]}
    assert load([], write(tmp_path, taken, f"method={method}"), with_data=False) == config


def test_another_version_trains_as_the_run_did(tmp_path: Path) -> None:
    file = write(tmp_path, {"optim.learning_rate": 1e-4, "method.alpha": 16, "model.dtype": "bf16"}, "method.r=16")
    config = load([], file, with_data=False)
    assert (config.optim.learning_rate, config.method.alpha, config.model.dtype) == (1e-4, 16, "auto")
    typed = load(["optim.learning_rate=3e-4", "method.alpha=7"], file, with_data=False)
    assert (typed.optim.learning_rate, typed.method.alpha) == (3e-4, 7)


def test_what_was_typed_is_not_taken_from_there(tmp_path: Path) -> None:
    file = write(tmp_path, {"optim.learning_rate": 1e-4}, "optim.learning_rate=5e-4")
    assert load([], file, with_data=False).optim.learning_rate == 5e-4
    file.write_text(file.read_text().split("taken:")[0] + "taken: 3\n")
    assert load([], file, with_data=False).optim.learning_rate == 5e-4
