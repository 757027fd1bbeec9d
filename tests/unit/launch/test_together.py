"""Trials that one process trains together: what it is told, and what becomes of each trial however that process ends.

The process is stood in for by a small `trainer.train --together` that writes the run folders' contract.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import launch.sweep.sweep
import launch.together
from launch.crew import Crew
from launch.report import words
from launch.report.gather import gather
from launch.report.together import sentences
from launch.sweep.fusing import describe
from launch.sweep.space import read_space
from launch.sweep.sweep import plan_sweep, run_sweep
from launch.together import OUT_OF_MEMORY, TrialGroup, group_trials
from tests.helpers.processes import ROOT
from tests.helpers.trials import GroupStandIn, stand_in, stand_in_for_the_process
from trainer.config import load, run_folder, to_yaml
from trainer.distributed.process_group import World
from trainer.files import run_lock_path, try_lock
from trainer.training.out_of_memory import explain_out_of_memory

TRAIN = """
import json, os, signal, sys
from trainer.config import load, run_folder, to_yaml

def train(overrides, together):
    config = load(overrides)
    folder, r = run_folder(config), config.method.r
    folder.mkdir(parents=True, exist_ok=True)
    with open("trained.txt", "a") as log:
        log.write(folder.name + (" together" if together else "") + "\\n")
    (folder / "config.yaml").write_text(to_yaml(config))
    summary = {"status": "finished", "metrics": {"eval_loss": 3.0 - r / 10}, "error": None, "steps": 8}
    if together:
        summary["together"] = together
    if r == 16 and not os.path.exists("mended"):
        why = open("why").read() if os.path.exists("why") else "loss is not finite"
        summary |= {"status": "failed", "metrics": {}, "error": {"kind": "training", "message": why}}
    if os.path.exists("stop"):
        summary |= {"status": "preempted", "stopped_by": "SIGTERM"}
    (folder / "new.json").write_text(json.dumps(summary))
    os.replace(folder / "new.json", folder / "summary.json")
    return summary["status"]

if sys.argv[1] != "--together":
    sys.exit(train(sys.argv[1:], None) != "finished")
group = json.load(open(sys.argv[2]))
if os.path.exists("stop"):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    os.kill(os.getppid(), signal.SIGTERM)
    signal.sigtimedwait([signal.SIGTERM], 10)
digest = os.path.basename(os.path.dirname(sys.argv[2]))
for place, overrides in enumerate(group["trials"]):
    if os.path.exists("kill") and place == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if os.path.exists("why") and place == 2:
        sys.exit(5)
    train(overrides, {"trials": len(group["trials"]), "group": digest})
sys.exit(75 if os.path.exists("stop") else 0)
"""
TYPED = ["debug=tiny", "run.name=s", "method.r=4,16,8"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which `python -m trainer.train` is the stand-in; the rest of `trainer` is the real one."""
    stand_in_for_the_process(monkeypatch, tmp_path, TRAIN)
    return tmp_path


def trained(folder: Path) -> list[str]:
    log = folder / "trained.txt"
    return log.read_text().splitlines() if log.exists() else []


def table(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "runs/s/sweep.csv").open() as file:
        return {row["method.r"]: row for row in csv.DictReader(file)}


def statuses(folder: Path) -> dict[str, str]:
    return {r: row["status"] for r, row in table(folder).items()}


@pytest.mark.slow
def test_a_failed_trial_is_its_own_and_is_what_is_left(folder: Path, logged: list[str]) -> None:
    assert run_sweep(TYPED) == 1
    assert trained(folder) == ["r4 together", "r16 together", "r8 together"]
    assert statuses(folder) == {"8": "finished", "4": "finished", "16": "failed"}
    assert "[2/3] r16: failed: loss is not finite" in logged
    (folder / "mended").touch()
    assert run_sweep(TYPED) == 0
    assert trained(folder)[3:] == ["r16"], "one that is left is a run by itself"
    assert statuses(folder) == {"8": "finished", "4": "finished", "16": "finished"}
    assert run_sweep([*TYPED, "sweep.fuse=off"]) == 0
    assert len(trained(folder)) == 4, "however it was trained, it is finished"


@pytest.mark.slow
def test_what_began_by_itself_goes_on_together(folder: Path) -> None:
    assert run_sweep(["debug=tiny", "run.name=s", "method.r=4,8", "sweep.fuse=off"]) == 0
    (folder / "mended").touch()
    assert run_sweep(["debug=tiny", "run.name=s", "method.r=4,16,8,2"]) == 0
    assert trained(folder) == ["r4", "r8", "r16 together", "r2 together"]


@pytest.mark.slow
def test_the_death_of_the_process_is_that_of_all_that_were_not_finished(folder: Path, logged: list[str]) -> None:
    (folder / "kill").touch()
    assert run_sweep(TYPED) == 1
    assert statuses(folder) == {"4": "finished", "8": "failed", "16": "failed"}
    for r in ("8", "16"):
        error = table(folder)[r]["error"]
        assert "killed by SIGKILL" in error
        assert error.endswith("sweep.fuse=off takes less memory")
    (folder / "kill").unlink()
    (folder / "mended").touch()
    assert run_sweep([*TYPED, "sweep.fuse=off"]) == 0
    assert trained(folder)[1:] == ["r16", "r8"]


@pytest.mark.slow
def test_where_memory_ran_out_fewer_are_advised(folder: Path) -> None:
    (folder / "why").write_text("out of device memory in training: 2.00 GiB were asked for → batch.micro_tokens=64")
    assert run_sweep([*TYPED[:2], "method.r=4,16,8,2"]) == 1
    found = table(folder)
    assert statuses(folder) == {"4": "finished", "16": "failed", "8": "failed", "2": "failed"}
    for r in ("16", "8", "2"):
        assert found[r]["error"].startswith("out of device memory")
        assert found[r]["error"].endswith("sweep.fuse=2 takes less memory")


@pytest.mark.slow
def test_stopped_it_ends_with_75_where_all_are_saved(folder: Path) -> None:
    (folder / "stop").touch()
    (folder / "mended").touch()
    code = "import functools, sys, launch.sweep.sweep as sweep;"
    code += f"sweep.Crew = functools.partial(sweep.Crew, forks=False); sys.exit(sweep.run_sweep({TYPED}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 75, ended.stderr
    assert set(statuses(folder).values()) == {"preempted"}
    (folder / "stop").unlink()
    assert run_sweep(TYPED) == 0


@pytest.mark.parametrize("by", [None, "run.stop_at_step", "SIGTERM", "STOP", "the death of its launcher"])
@pytest.mark.parametrize("is_halved", [True, False])
@pytest.mark.parametrize("code", [0, 75, 1])
def test_a_preempted_trial_is_at_its_rung_or_was_stopped(
    groups: GroupStandIn, by: str | None, is_halved: bool, code: int
) -> None:
    """torchrun's own code says nothing of a clean stop, so the trial's own word counts."""

    def run_group(trials: list[launch.trials.Trial], *_: object) -> tuple[int, str]:
        for trial in trials:
            trial.folder.mkdir(parents=True, exist_ok=True)
            summary = {"status": "preempted", "steps": 4, "stopped_by": by}
            (trial.folder / "summary.json").write_text(json.dumps(summary))
        return code, "why"

    del groups
    folder, trials = plan_sweep(TYPED)
    halving = {"min_steps": 4} if is_halved else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch.together, "run_group", run_group)
        labels = {trial.name: trial.name for trial in trials}
        at_step = [trial.until(4) for trial in trials]
        assert set(TrialGroup(at_step, folder, labels)._train(at_step, halving).values()) == {(0, "")}
        at_rung = is_halved and by in (None, "run.stop_at_step")
        for trial in trials:
            (trial.folder / "summary.json").unlink()
        outcomes = TrialGroup(trials, folder, labels)._train(trials, halving)
    assert set(outcomes.values()) == {(0, "") if at_rung else (75, "")}


def test_with_torchrun_each_process_gets_the_file(groups: GroupStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    del groups
    monkeypatch.undo()
    seen: list[tuple[list[str], dict[str, str], Path]] = []
    monkeypatch.setattr("launch.process.run", lambda *given: (seen.append(given), 0)[1])
    folder, trials = plan_sweep([*TYPED, "launch=torchrun", "launch.nproc_per_node=2"])
    monkeypatch.setattr(launch.together, "write_atomically", lambda *_: None)
    assert launch.together.run_group(trials, folder) == (0, "")
    ((command, environment, place),) = seen
    assert command[command.index("trainer.torchrun") + 1] == "--nproc-per-node=2"
    assert command[-4:] == ["-m", "trainer.train", "--together", str(folder / "group.json")]
    assert environment["AFINA_TRIAL"] == "1"
    assert place == folder


def test_how_a_message_about_memory_begins() -> None:
    config, world = load(["debug=tiny"]), World(0, 1, 0, torch.device("cpu"))
    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError()):
        explained = explain_out_of_memory(error, config, world)
        assert explained is not None
        assert str(explained).startswith(OUT_OF_MEMORY)


def test_what_the_process_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, trials = plan_sweep(TYPED)
    seen: list[list[str]] = []

    class Seen(Crew):
        def run(self, arguments: object, folder: Path) -> tuple[int, None]:
            assert isinstance(arguments, list)
            seen.append(arguments)
            assert folder == tmp_path / "group"
            return 0, None

    (tmp_path / "group").mkdir()
    halving = {"min_steps": 2, "reduction_factor": 3, "metric": "eval_loss", "lower_is_better": True}
    crew = Seen(forks=False)
    assert launch.together.run_group(trials, tmp_path / "group", Path("c.yaml"), crew, halving) == (0, "")
    assert seen == [["--together", str(tmp_path / "group" / "group.json")]]
    told = json.loads((tmp_path / "group" / "group.json").read_text())
    assert told == {"config": "c.yaml", "trials": [trial.overrides for trial in trials], "halving": halving}
    for overrides, trial in zip(told["trials"], trials, strict=True):
        assert run_folder(load(overrides)) == trial.folder


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GroupStandIn:
    def run_trial(trial: launch.trials.Trial, *_: object) -> tuple[int, str]:
        trial.folder.mkdir(parents=True, exist_ok=True)
        (trial.folder / "config.yaml").write_text(to_yaml(trial.config))
        (trial.folder / "summary.json").write_text(json.dumps({"status": "finished", "metrics": {"eval_loss": 1.0}}))
        return 0, ""

    return stand_in(monkeypatch, tmp_path, run_trial)


def test_one_that_another_trains_is_waited_for(groups: GroupStandIn) -> None:
    folder, trials = plan_sweep(TYPED)
    together = TrialGroup(trials, folder, {trial.name: trial.name for trial in trials})
    trials[1].folder.mkdir(parents=True)
    job = together.run()
    with try_lock(run_lock_path(trials[1].folder)) as held:
        assert held
        assert next(job).startswith("r16 (")
        assert groups.groups == [["r4", "r8"]]
        assert next(job).startswith("r16 ("), "still"
    with pytest.raises(StopIteration) as end:
        next(job)
    assert end.value.value == dict.fromkeys(("r4", "r8", "r16"), (0, ""))
    assert groups.groups == [["r4", "r8"]], "the one that is left is a run by itself"


def test_two_equal_sweeps_do_not_share_a_group_out(groups: GroupStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another sweep looks while the process of the first is loading its libraries."""
    folder, trials = plan_sweep(TYPED)
    labels = {trial.name: trial.name for trial in trials}

    def while_it_runs(*arguments: object, **_: object) -> tuple[int, str]:
        other = TrialGroup(trials, folder, labels).run()
        assert next(other) == "r4 (another process, which is starting it)"
        assert TrialGroup(trials, folder, labels).run_halved({}) == {}
        return groups(*arguments)

    monkeypatch.setattr(launch.together, "run_group", while_it_runs)
    assert _finish(TrialGroup(trials, folder, labels)) == dict.fromkeys(labels, (0, ""))
    assert groups.groups == [["r4", "r16", "r8"]]


def test_a_group_is_claimed_before_its_trials(groups: GroupStandIn) -> None:
    folder, trials = plan_sweep(TYPED)
    together = TrialGroup(trials, folder, {trial.name: trial.name for trial in trials})
    together.folder.mkdir(parents=True)
    with try_lock(together.folder / "claim.lock"):
        assert next(together.run()) == "r4 (another process, which is starting it)"
    assert groups.groups == []


def test_one_who_was_quicker_is_waited_for(groups: GroupStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """`afina train` claims no trial: the process that was started here is refused."""
    folder, trials = plan_sweep(TYPED)
    trials[0].folder.mkdir(parents=True)
    with try_lock(run_lock_path(trials[0].folder)):
        with monkeypatch.context() as patch:
            patch.setattr(launch.together, "run_group", lambda *_: (4, "is being trained"))
            together = TrialGroup(trials, folder, {trial.name: trial.name for trial in trials})
            together.folder.mkdir(parents=True)
            assert together._train(trials) == {}
        assert next(together.run()).startswith("r4 (")
        assert groups.groups == [["r16", "r8"]]


def test_groups_are_dealt_out_over_the_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, trials = plan_sweep([*TYPED[:2], "method.r=1,2,4,8,16", "method.alpha=1,2"])
    assert [len(group.places) for group in group_trials(trials, "auto")] == [10]
    assert [len(group.places) for group in group_trials(trials, "auto", at_once=4)] == [2, 3, 2, 3]
    assert [len(group.places) for group in group_trials(trials, 4)] == [3, 3, 4]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("method.r=2,4", ["together in one process (sweep.fuse=auto): r2, r4"]),
        ("method.r=2,4 sweep.fuse=off", ["each alone: r2, r4 (sweep.fuse=off)"]),
        ("method.r=2,4 sweep.fuse=1", ["each alone: r2, r4 (sweep.fuse=1)"]),
        ("method.r=2,4 launch=slurm", ["each alone: under launch=slurm a trial is an element of a job array"]),
        ("run.seed=1,2", ["each alone: seed1, seed2 (no other has its run.seed)"]),
        ("method.r=2,4 sweep.parallel=2", ["each alone: r2, r4 (each process has a device of its own, and there are"]),
        (
            "method.r=2,4 method.dropout=0,0.1",
            [
                "together in one process (sweep.fuse=auto): r2_dropout0, r4_dropout0",
                "each alone: r2_dropout0.1, r4_dropout0.1 (method.dropout=0.1: ",
            ],
        ),
    ],
)
def test_a_dry_run_says_who_is_together_and_why_not(typed: str, said: list[str]) -> None:
    keys = ["debug=tiny", *typed.split()]
    lines = list(describe(read_space(keys), plan_sweep(keys)[1]))
    assert len(lines) == len(said)
    for line, begin in zip(lines, said, strict=True):
        assert line.startswith(begin)


@pytest.mark.slow
def test_the_table_and_the_page_say_who_was_together(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mended").touch()
    assert run_sweep(TYPED) == 0
    (group,) = (folder / "runs/s/.together").iterdir()
    told = f"Trained together by one process ({group.name}): r16, r8, r4; one start, one load of the base"
    told += " in place of 3."
    assert told in capsys.readouterr().out
    assert {row["together"] for row in table(folder).values()} == {group.name}
    assert (folder / "runs/s/sweep.md").read_text().splitlines()[-1] == f"- {told}"
    assert told in words.more(gather(folder / "runs/s"))
    assert told in (folder / "runs/s/report.html").read_text()
    assert "One process trained it together with other trials of its sweep." in words.more(gather(folder / "runs/s/r4"))


def test_what_is_saved_is_told_as_far_as_it_was_there() -> None:
    scored = {"together": {"trials": 3, "group": "ab"}, "metrics": {"eval_loss_before": 2.0}}
    assert sentences([("a", scored), ("b", {}), ("c", {"together": 5}), ("d", scored)]) == [
        "Trained together by one process (ab): a, d; one start, one load of the base and one evaluation of it in place "
        "of 3."
    ]
    assert "h, … (9)" in sentences([(name, scored) for name in "abcdefghi"])[0]


def test_tpe_is_fused_where_a_number_is_given(groups: GroupStandIn) -> None:
    tpe = [*TYPED[:2], "sweep.sampler=tpe", "sweep.trials=5", "method.r=range(1,40)"]
    assert run_sweep(tpe) == 0
    assert groups.groups == []
    assert run_sweep([*tpe, "sweep.fuse=2", "run.dir=there"]) == 0
    assert [len(names) for names in groups.groups] == [2, 2], "the fifth is alone"


def _finish(group: TrialGroup) -> dict[str, tuple[int, str]]:
    with pytest.raises(StopIteration) as end:
        next(group.run())
    outcomes: dict[str, tuple[int, str]] = end.value.value
    return outcomes
