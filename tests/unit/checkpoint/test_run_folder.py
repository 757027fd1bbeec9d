"""The run folder at a start: fresh, resumed, finished; and a finished run answers for its own settings only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tokenizers import write_rows
from trainer.checkpoint import run_folder as runs
from trainer.checkpoint.commit import checkpoint_dir, commit
from trainer.checkpoint.run_folder import Run
from trainer.config import TrainConfig, load, to_yaml
from trainer.errors import ConfigError
from trainer.files import partial_path

SUMMARY = {"status": "finished", "steps": 4, "metrics": {"eval_loss": 1.5}, "error": None}


class Folder:
    def __init__(self, folder: Path, logged: list[str]) -> None:
        self.where = folder / "runs"
        self.data = write_rows(folder / "rows.jsonl", [{"instruction": "a", "output": "b"}] * 4)
        self.logged = logged

    def config(self, *overrides: str) -> TrainConfig:
        return load(["model=tiny", f"data.path={self.data}", "run.name=one", f"run.dir={self.where}", *overrides])

    def decide(self, *overrides: str, total_steps: int = 4, fingerprint: str = "the rows") -> Run:
        return runs._decide(self.config(*overrides), total_steps, fingerprint)

    def leave(self, status: str, *overrides: str) -> Path:
        """A run as one that ended so would leave it."""
        folder = self.where / "one"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(to_yaml(self.config(*overrides)))
        (folder / "summary.json").write_text(json.dumps({**SUMMARY, "status": status}))
        return folder


@pytest.fixture
def folder(tmp_path: Path, logged: list[str]) -> Folder:
    return Folder(tmp_path, logged)


def test_a_new_name_starts_afresh(folder: Folder) -> None:
    assert folder.decide() == Run(folder.where / "one")
    assert (folder.where / "one").is_dir()
    assert folder.decide() == Run(folder.where / "one")  # an empty folder is a run that had not begun


@pytest.mark.parametrize("status", ["preempted", "failed"])
def test_an_unfinished_run_goes_on(folder: Folder, status: str) -> None:
    folder.leave(status)
    assert folder.decide().finished is None


def test_a_finished_run_gives_its_summary(folder: Folder) -> None:
    left = folder.leave("finished")
    before = {f: f.read_bytes() for f in left.iterdir()}
    decision = folder.decide()
    assert decision.finished == SUMMARY
    assert "eval_loss: 1.5000" in folder.logged
    assert any(line.startswith("finished 4 steps") for line in folder.logged)
    assert {f: f.read_bytes() for f in left.iterdir()} == before


def test_how_a_run_is_carried_out_is_not_its_result(folder: Folder) -> None:
    folder.leave("finished")
    same = ["log.wandb=off", "log.tags=[a]", "launch.kind=torchrun", "checkpoint.keep=5", "data.cache_dir=/x"]
    same += ["data.workers=2", "batch.micro_tokens=2048", "zero=stage3", "eval.metrics=[exact_match]"]
    assert folder.decide(*same).finished == SUMMARY


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("method.r=3", "method.r 16 → 3"),
        ("run.seed=7", "run.seed 0 → 7"),
        ("optim.learning_rate=0.1", "optim.learning_rate None → 0.1"),
        ("batch.epochs=9", "batch.epochs 1.0 → 9.0"),
        ("data.max_length=64", "data.max_length"),
        ("zero.extra.a=1", "zero.extra.a None → 1"),
    ],
)
def test_a_finished_run_of_other_settings_is_not_passed_off(folder: Folder, change: str, told: str) -> None:
    folder.leave("finished", "method.r=16", "batch.epochs=1")
    common = ("method.r=16", "batch.epochs=1")
    assert folder.decide(*common).finished == SUMMARY
    with pytest.raises(ConfigError) as caught:
        folder.decide(*common, change)
    assert told in str(caught.value)
    assert "run.overwrite=true" in str(caught.value)


@pytest.mark.parametrize("change", ["batch.epochs=2", "batch.max_steps=9"])
def test_a_finished_run_goes_on_when_its_steps_are_raised(folder: Folder, change: str) -> None:
    left = folder.leave("finished", "batch.epochs=1")
    last = write_checkpoint(left, 4)
    assert folder.decide(change, total_steps=9) == Run(left, resume_from=last)
    assert json.loads((left / "summary-00000004.json").read_text()) == SUMMARY
    assert "goes on to 9" in folder.logged[-1]
    # killed there, it is an unfinished run
    assert folder.decide(change, total_steps=9) == Run(left, resume_from=last)


@pytest.mark.parametrize(
    ("change", "total_steps"), [("batch.max_steps=3", 3), ("optim.learning_rate=0.1", 9), ("batch.epochs=2", 4)]
)
def test_other_changes_of_a_finished_run_stay_an_error(folder: Folder, change: str, total_steps: int) -> None:
    write_checkpoint(folder.leave("finished", "batch.epochs=1"), 4)
    with pytest.raises(ConfigError, match="finished run with other settings"):
        folder.decide(change, total_steps=total_steps)


def test_a_finished_run_without_a_checkpoint_cannot_go_on(folder: Folder) -> None:
    folder.leave("finished", "batch.epochs=1")
    with pytest.raises(ConfigError, match="finished run with other settings"):
        folder.decide("batch.epochs=2", total_steps=8)


def test_a_finished_run_says_that_its_rows_have_changed(folder: Folder) -> None:
    left = folder.leave("finished")
    (left / "summary.json").write_text(json.dumps({**SUMMARY, "data_fingerprint": "the rows"}))
    folder.decide()
    assert not any("rows have changed" in line for line in folder.logged)
    folder.decide(fingerprint="other rows")
    assert any("rows have changed" in line for line in folder.logged)


def write_checkpoint(run: Path, step: int) -> Path:
    folder = checkpoint_dir(run, step)
    partial = partial_path(folder)
    partial.mkdir(parents=True)
    (partial / "state.json").write_text(json.dumps({"step": step, "resume": "auto"}))
    commit(partial, folder)
    return folder


def test_moved_data_leaves_the_summary_standing(folder: Folder) -> None:
    folder.leave("finished")
    other = write_rows(folder.data.with_name("other.jsonl"), [{"instruction": "a", "output": "b"}])
    folder.data.unlink()
    folder.data = other
    assert folder.decide().finished == SUMMARY


def test_overwrite_moves_the_old_folder_aside_each_time(folder: Folder) -> None:
    for _ in range(3):  # within one second
        left = folder.leave("finished")
        assert folder.decide("run.overwrite=true") == Run(left)
        assert not list(left.iterdir())
        left.rmdir()
    aside = sorted(f for f in folder.where.iterdir() if f.name.startswith("one."))
    assert len(aside) == 3
    assert all((f / "summary.json").exists() for f in aside)
    assert sum("moved to" in text for text in folder.logged) == 3


def test_metrics_of_before(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [{"step": 0, "epoch": 0.0, "eval_loss": 2.0}, {"step": 1, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert Run(tmp_path).scores_before() == {"eval_loss": 2.0}
    assert Run(tmp_path).last_logged_step() == 1
    assert Run(tmp_path / "nothing").scores_before() == {}
    assert Run(tmp_path / "nothing").last_logged_step() == 0
