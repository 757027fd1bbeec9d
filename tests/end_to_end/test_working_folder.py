"""Files in the working folder that are called like modules are never imported, by no process of ours."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT, run

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


def test_nobody_else_may_write_what_a_run_makes(tmp_path: Path, tiny_model: Path) -> None:
    """Whatever the umask was. Its cache is a new one: the tables in it are made by this run."""
    keys = "debug=tiny log=off run.name=x batch.max_steps=2 eval.metrics=[loss]"
    script = f"umask 000; exec {sys.executable} -m trainer.cli train {keys} data.cache_dir=tables"
    run(["sh", "-c", script], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, timeout_seconds=200)
    made = [path for path in tmp_path.rglob("*") if not path.is_symlink()]
    assert len(made) > 20
    assert [path for path in made if path.stat().st_mode & 0o002] == []
