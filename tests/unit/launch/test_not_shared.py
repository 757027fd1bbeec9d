"""Trials that turn out not to fit on one model, or not on the device: they come to what they are alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import launch.together
from launch.sweep.sweep import run_sweep
from launch.trials import Trial
from tests.helpers.trials import stand_in
from trainer.config import to_yaml
from trainer.errors import NotSharedError, TooManyTrialsError

TYPED = ["debug=tiny", "run.name=s", "method.r=2,4,6,8"]


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The trials that were trained by themselves, each finished at once; no group is."""
    trained: list[str] = []

    def run_trial(trial: Trial, *_: object) -> tuple[int, str]:
        trained.append(trial.name)
        finish(trial)
        return 0, ""

    stand_in(monkeypatch, tmp_path, run_trial)
    return trained


def finish(trial: Trial, **more: Any) -> None:
    trial.folder.mkdir(parents=True, exist_ok=True)
    (trial.folder / "config.yaml").write_text(to_yaml(trial.config))
    (trial.folder / "metrics.jsonl").write_text(json.dumps({"step": 3, "loss": trial.config.method.r}) + "\n")
    summary = {"status": "finished", "steps": 8, "train_loss": float(trial.config.method.r or 0), "metrics": {}, **more}
    (trial.folder / "new.json").write_text(json.dumps(summary))
    (trial.folder / "new.json").replace(trial.folder / "summary.json")


class Groups:
    """Stands in for the process of a group: one of more trials than ``fit`` ends with the error."""

    def __init__(self, fit: int, kind: str) -> None:
        self.fit, self.kind, self.asked, self.folders = fit, kind, list[int](), list[Path]()

    def __call__(self, trials: Sequence[Trial], folder: Path, *_: object) -> tuple[int, str]:
        self.asked.append(len(trials))
        self.folders.append(folder)
        failure = {"status": "failed", "error": {"kind": self.kind, "message": "too much"}}
        for trial in trials:
            finish(trial, **(failure if len(trials) > self.fit else {}))
        return (2, "too much") if len(trials) > self.fit else (0, "")


@pytest.mark.parametrize("halved", [False, True])
def test_trials_that_cannot_share_a_model_are_trained_alone(
    alone: list[str], halved: bool, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    groups = Groups(fit=1, kind=NotSharedError.kind)
    monkeypatch.setattr(launch.together, "run_group", groups)
    asha = ["sweep.early_stopping=asha", "sweep.min_steps=3"] if halved else []
    assert run_sweep([*TYPED, *asha]) == 0
    assert sorted(set(alone)) == ["r2", "r4", "r6", "r8"]
    assert groups.asked == [4], "it is tried once"
    assert any("each by itself: too much" in line for line in logged)


def test_half_as_many_are_tried_where_the_device_is_too_small(
    alone: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = Groups(fit=2, kind=TooManyTrialsError.kind)
    monkeypatch.setattr(launch.together, "run_group", groups)
    assert run_sweep(TYPED) == 0
    assert groups.asked == [4, 2, 2]
    assert len(set(groups.folders)) == 3, "each is a group of its own"
    assert alone == []
