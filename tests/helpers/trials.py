"""Let something else stand in for the training of trials."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import launch.sweep.fusing
import launch.sweep.sweep
import launch.together
import launch.trials
from launch import process
from launch.crew import Crew
from launch.trials import Trial, has_reached, is_finished
from tests.helpers.processes import ROOT
from trainer.config import to_yaml
from trainer.tracking.files import find_summary
from trainer.tracking.halving import decide, score_until

RunTrial = Callable[..., tuple[int, str]]


def stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path, run_trial: RunTrial) -> GroupStandIn:
    """Call ``run_trial`` in the place of ``launch.trials.run_trial``, and for each trial of a group; in ``folder``, on
    a machine without a GPU."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(launch.trials, "run_trial", run_trial)
    groups = GroupStandIn(run_trial)
    monkeypatch.setattr(launch.together, "run_group", groups)
    monkeypatch.setattr(launch.sweep.fusing, "visible_gpus", lambda: 0)
    return groups


def stand_in_for_the_process(monkeypatch: pytest.MonkeyPatch, folder: Path, train: str) -> None:
    """Let ``folder`` be the working directory, in which `python -m trainer.train` is this source; the rest of `trainer`
    is the real one. Each trial of a sweep has a process that loads no more than it needs; forks of a loaded one are in
    test_trial_server.py."""
    package = folder / "trainer"
    package.mkdir()
    (package / "__init__.py").write_text(f"__path__.append({str(ROOT / 'trainer')!r})\n")
    (package / "train.py").write_text(train)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(launch.sweep.sweep, "Crew", partial(Crew, forks=False))


class GroupStandIn:
    """Stands in for `trainer.train --together`: trains one trial after the other, and from rung to rung where it is
    asked to; what has failed has a summary that says so."""

    def __init__(self, run_trial: RunTrial) -> None:
        self.groups: list[list[str]] = []
        self.rules: list[Mapping[str, Any] | None] = []
        self._run_trial = run_trial

    def __call__(
        self,
        trials: Sequence[Trial],
        folder: Path,
        config_file: Path | None = None,
        crew: object = None,
        halving: Mapping[str, Any] | None = None,
    ) -> tuple[int, str]:
        assert folder.parent.name == ".together"
        self.groups.append([trial.name for trial in trials])
        self.rules.append(halving)
        if halving is None:
            return self._train(trials)[0], ""
        alive, step = list(trials), int(halving["min_steps"])
        while alive and not all(map(is_finished, alive)):
            last = len(alive) == 1
            code, failed = self._train([trial.until(None if last else step) for trial in alive])
            if code:
                return code, ""
            alive = [trial for trial in alive if trial.name not in failed]
            if len(alive) > 1:
                scores = [score_until(trial.folder, step, halving["metric"]) for trial in alive]
                kept = decide(scores, halving["reduction_factor"], halving["lower_is_better"])
                for place, trial in enumerate(alive):
                    if place not in kept and not is_finished(trial):
                        _write_summary(trial, {**find_summary(trial.folder), "stopped_by": "sweep.early_stopping"})
                alive, step = [alive[place] for place in kept], step * int(halving["reduction_factor"])
        return 0, ""

    def _train(self, trials: Sequence[Trial]) -> tuple[int, set[str]]:
        """Return the code of a stop, and who has failed."""
        failed = set()
        for trial in trials:
            if is_finished(trial) or has_reached(trial):
                continue
            code, error = self._run_trial(trial)
            if code in process.STOPPED:
                return code, failed
            if code:
                failed.add(trial.name)
                trial.folder.mkdir(parents=True, exist_ok=True)
                (trial.folder / "config.yaml").write_text(to_yaml(trial.config))
                summary = {"steps": find_summary(trial.folder).get("steps") or 0}
                summary |= {"status": "failed", "error": {"kind": "training", "message": error}}
                _write_summary(trial, summary)
        return 0, failed


def _write_summary(trial: Trial, summary: Mapping[str, Any]) -> None:
    """Write it as a new file, as a run does."""
    (trial.folder / "new.json").write_text(json.dumps(summary))
    (trial.folder / "new.json").replace(trial.folder / "summary.json")
