"""Two sweeps or comparisons of the same trials at once: what the other one trains is left, and waited for at the end.

Runs are stood in for; two real sweeps at once are in tests/end_to_end/test_sweep_verb.py.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import launch.trials
from launch import process
from launch.compare.compare import run_comparison
from launch.sweep.sweep import plan_sweep, run_sweep
from launch.trials import Trial
from trainer.config import to_yaml
from trainer.files import OWNER_FILE, run_lock_path, try_lock

SWEEP = ["debug=tiny", "run.name=s", "sweep.fuse=off", "method.r=4,8,16"]


def finish(trial: Trial, loss: float = 2.0) -> None:
    trial.folder.mkdir(parents=True, exist_ok=True)
    (trial.folder / "config.yaml").write_text(to_yaml(trial.config))
    (trial.folder / "metrics.jsonl").touch()
    metrics = {"eval_loss": loss}
    (trial.folder / "summary.json").write_text(json.dumps({"status": "finished", "metrics": metrics, "train_loss": 1}))


class Other:
    """Stands in for the other command: it owns trials, and what happens to them is a step for each time we wait."""

    def __init__(self) -> None:
        self.owned: dict[str, ExitStack] = {}
        self.steps: list[Callable[[], object]] = []
        self.trained: list[str] = []
        self.code = 0

    def trains(self, trial: Trial) -> None:
        held = self.owned[trial.name] = ExitStack()
        trial.folder.mkdir(parents=True, exist_ok=True)
        assert held.enter_context(try_lock(run_lock_path(trial.folder)))
        owner = {"host": "here", "pid": 12, "job": None, "since": "noon"}
        (trial.folder / OWNER_FILE).write_text(json.dumps(owner))

    def ends(self, trial: Trial) -> None:
        (trial.folder / OWNER_FILE).unlink()
        self.owned.pop(trial.name).close()

    def finishes(self, trial: Trial) -> None:
        finish(trial)
        self.ends(trial)

    def pause(self, _: float) -> int:
        self.steps.pop(0)()
        return self.code

    def run_trial(self, trial: Trial, *_: object) -> tuple[int, str]:
        self.trained.append(trial.name)
        finish(trial)
        return 0, ""


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Other]:
    made = Other()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(process, "pause", made.pause)
    monkeypatch.setattr(launch.trials, "run_trial", made.run_trial)
    monkeypatch.setattr("trainer.files.locks.socket.gethostname", lambda: "here")
    yield made
    for held in made.owned.values():
        held.close()


def table() -> dict[str, str]:
    with Path("runs/s/sweep.csv").open() as file:
        return {row["method.r"]: row["status"] for row in csv.DictReader(file)}


ALL_FINISHED = {"4": "finished", "8": "finished", "16": "finished"}


def test_what_the_other_trains_is_left_and_taken_as_it_finishes_it(other: Other, logged: list[str]) -> None:
    r4, _, r16 = plan_sweep(SWEEP)[1]
    other.trains(r4)
    other.trains(r16)
    other.steps = [lambda: other.finishes(r16), lambda: None, lambda: other.finishes(r4)]
    assert run_sweep(SWEEP) == 0
    assert other.trained == ["r8"]
    assert table() == ALL_FINISHED
    assert logged[1:] == [
        "[1/3] r4: left to process 12 on here, since noon",
        "[2/3] r8: starting",
        "[3/3] r16: left to process 12 on here, since noon",
        "waiting for [1/3] r4 (process 12 on here, since noon), [3/3] r16 (process 12 on here, since noon)",
        "[3/3] r16: finished before",
        "waiting for [1/3] r4 (process 12 on here, since noon)",
        "[1/3] r4: finished before",
        "written: runs/s/sweep.csv, runs/s/sweep.md, runs/s/report.html",
    ]


def test_what_the_other_gives_up_is_trained_here(other: Other) -> None:
    r4 = plan_sweep(SWEEP)[1][0]
    other.trains(r4)
    other.steps = [lambda: other.ends(r4)]
    assert run_sweep(SWEEP) == 0
    assert other.trained == ["r8", "r16", "r4"]
    assert table() == ALL_FINISHED


def test_a_trial_that_another_is_only_starting_is_its_own(other: Other, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another sweep looks while the process of this one's first trial is loading its libraries."""
    seen: list[int] = []

    def run_trial(trial: Trial, *_: object) -> tuple[int, str]:
        if trial.name == "r4":
            with monkeypatch.context() as patch:
                patch.setattr(process, "pause", lambda _: 128 + 15)
                patch.setattr(launch.trials, "run_trial", other.run_trial)
                seen.append(run_sweep(SWEEP))
        return other.run_trial(trial)

    monkeypatch.setattr(launch.trials, "run_trial", run_trial)
    assert run_sweep(SWEEP) == 0
    assert seen == [143], "stopped while it waited"
    assert other.trained == ["r8", "r16", "r4"], "each once"
    assert table() == ALL_FINISHED


def test_one_who_was_quicker_is_waited_for(other: Other, monkeypatch: pytest.MonkeyPatch) -> None:
    """`afina train` claims no trial: only the process that was started here meets it."""
    r4 = plan_sweep(SWEEP)[1][0]

    def run_trial(trial: Trial, *_: object) -> tuple[int, str]:
        if trial.name == "r4":
            other.trains(r4)
            return 4, "is being trained"
        return other.run_trial(trial)

    monkeypatch.setattr(launch.trials, "run_trial", run_trial)
    other.steps = [lambda: other.finishes(r4)]
    assert run_sweep(SWEEP) == 0
    assert other.trained == ["r8", "r16"]
    assert table() == ALL_FINISHED


def test_an_error_of_code_4_without_an_owner_is_a_failure(other: Other, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.trials, "run_trial", lambda *_: (4, "a rank was lost"))
    assert run_sweep(SWEEP) == 1
    assert set(table().values()) == {"failed"}


def test_stopped_while_it_waits_it_shows_what_there_is(other: Other) -> None:
    r4 = plan_sweep(SWEEP)[1][0]
    other.trains(r4)
    other.steps, other.code = [lambda: None], 130
    assert run_sweep(SWEEP) == 130
    assert table() == {**ALL_FINISHED, "4": "not run"}


def test_on_several_nodes_the_same_sweep_is_no_other(other: Other, monkeypatch: pytest.MonkeyPatch) -> None:
    """Node 1 joins the trial that node 0 has begun."""
    nodes = [*SWEEP, "launch=torchrun", "launch.nodes=2", "launch.master_address=node0"]
    seen: list[int] = []

    def run_trial(trial: Trial, *_: object) -> tuple[int, str]:
        if not seen:
            seen.append(0)
            monkeypatch.setattr(launch.trials, "run_trial", other.run_trial)
            assert run_sweep([*nodes, "launch.node_rank=1"]) == 0
        return other.run_trial(trial)

    monkeypatch.setattr(launch.trials, "run_trial", run_trial)
    assert run_sweep(nodes) == 0
    assert other.trained[:3] == ["r4", "r8", "r16"]


def test_a_comparison_goes_on_with_the_next_method(other: Other, logged: list[str]) -> None:
    typed = ["debug=tiny", "run.name=c", "compare.methods=['lora r=8',ia3]", "compare.tune=[1]"]
    with pytest.MonkeyPatch.context() as patch:
        trials: list[Trial] = []
        patch.setattr(launch.trials, "run_if_needed", lambda trial, *_: (trials.append(trial), (75, ""))[1])
        assert run_comparison(typed) == 75
    other.trains(trials[0])
    other.steps = [lambda: other.finishes(trials[0])]
    assert run_comparison(typed) == 0
    assert [name.split("-")[0] for name in other.trained] == ["ia3"] * 5 + ["lora"] * 4
    assert trials[0].name not in other.trained
    assert any(line.startswith("[1/2] lora r=8, learning rate 0.0002: left to process 12") for line in logged)
    with Path("runs/c/compare.csv").open() as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["finished", "finished"]


def test_a_pause_ends_at_once_when_it_is_asked_to_stop() -> None:
    begin = time.monotonic()
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert process.pause(60) == 143
    assert time.monotonic() - begin < 30
    assert process.pause(0.01) == 0
