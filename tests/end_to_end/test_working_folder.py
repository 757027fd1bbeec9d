"""Files in the working folder that are called like modules are never imported, by no process of ours."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.helpers.processes import run

NAMES = ("json", "logging", "torch", "datasets", "numpy", "transformers", "pickle", "random")


@pytest.fixture
def work(tmp_path: Path) -> Path:
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text("from pathlib import Path\nPath('EXECUTED').write_text(__file__)\n")
    return tmp_path


def test_a_run_in_two_processes_with_data_workers(work: Path, tiny_model: Path) -> None:
    (work / "trainer.py").write_text("open('EXECUTED', 'w').write(__file__)\n")
    afina = str(Path(sys.executable).with_name("afina"))
    keys = ["debug=tiny", "log=off", "run.name=x", "batch.max_steps=2", "data.workers=1", "eval.metrics=[loss]"]
    run([afina, "train", *keys, "launch=torchrun", "launch.nproc_per_node=2"], cwd=work, timeout_seconds=200)
    assert not (work / "EXECUTED").exists()


def test_train_started_by_hand(work: Path, tiny_model: Path) -> None:
    done = run([sys.executable, "-m", "trainer.train", "method.r=0"], cwd=work, check=False)
    assert done.returncode == 2, done.tail()
    assert not (work / "EXECUTED").exists()
