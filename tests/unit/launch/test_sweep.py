"""A sweep: names and folders, what is done again and what is not, failures, and the ranked table.

The runs themselves are stood in for by a small `trainer.train` that writes the run folder's contract.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.sweep import report as ranking
from launch.sweep.sweep import plan_sweep, run_sweep
from tests.helpers.processes import ROOT
from tests.helpers.trials import stand_in_for_the_process
from trainer.config import load, run_folder
from trainer.errors import ConfigError

TRAIN = """
import json, os, signal, sys
from trainer.config import load, run_folder, to_yaml
config = load(sys.argv[1:])
folder = run_folder(config)
folder.mkdir(parents=True, exist_ok=True)
with open("trained.txt", "a") as log:
    log.write(folder.name + "\\n")
(folder / "config.yaml").write_text(to_yaml(config))
r = config.method.r
summary = {"status": "finished", "trainable_parameters": 1000 * r, "train_loss": 1.0, "wall_seconds": 2.5,
           "metrics": {"eval_loss": 3.0 - r / 10, "exact_match": 0.25}, "error": None}
if r == 16 and not os.path.exists("mended"):
    summary |= {"status": "failed", "metrics": {}, "error": {"kind": "data", "message": "row 3 | is empty", "rank": 0}}
if r == 5:
    os.kill(os.getpid(), signal.SIGKILL)
if os.path.exists("stop"):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    os.kill(os.getppid(), signal.SIGTERM)
    signal.sigtimedwait([signal.SIGTERM], 10)
    summary |= {"status": "preempted", "metrics": {}}
(folder / "new.json").write_text(json.dumps(summary))
os.replace(folder / "new.json", folder / "summary.json")
sys.exit(summary["status"] != "finished")
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which `python -m trainer.train` is the stand-in; the rest of `trainer` is the real one."""
    stand_in_for_the_process(monkeypatch, tmp_path, TRAIN)
    return tmp_path


def trained(folder: Path) -> list[str]:
    log = folder / "trained.txt"
    return log.read_text().split() if log.exists() else []


def test_every_combination_is_a_run_of_its_own() -> None:
    folder, trials = plan_sweep(["debug=tiny", "method.alpha=8,16", "method.r=4,8"])
    assert [trial.name for trial in trials] == ["r4_alpha8", "r8_alpha8", "r4_alpha16", "r8_alpha16"]
    assert {(trial.config.method.r, trial.config.method.alpha) for trial in trials} == {
        (4, 8),
        (8, 8),
        (4, 16),
        (8, 16),
    }
    for trial in trials:
        assert trial.folder == folder / trial.name == run_folder(load(trial.overrides))
        assert trial.config.log.group == folder.name
    assert folder.parent == Path("runs")


def test_the_same_sweep_has_the_same_folders_in_any_order() -> None:
    here = plan_sweep(["debug=tiny", "method.alpha=8,16", "method.r=4,8", "launch=torchrun"])
    there = plan_sweep(["method.r=8,4", "debug=tiny", "method.alpha=16,8", "log=off"])
    other = plan_sweep(["debug=tiny", "method.alpha=8,16", "method.r=4,8", "run.seed=1"])
    assert here[0] == there[0] != other[0]
    assert {trial.folder for trial in here[1]} == {trial.folder for trial in there[1]}


def test_names() -> None:
    def names(*overrides: str) -> list[str]:
        return [trial.name for trial in plan_sweep(["debug=tiny", *overrides])[1]]

    assert names("method.target_modules=attention,all_linear") == [
        "target_modules-attention",
        "target_modules-all-linear",
    ]
    assert names("zero=stage0,stage2", "optim.learning_rate=1e-4,1e-3")[0] == "zero-stage0_learning_rate0.0001"
    # two keys that end alike keep their sections; values that a folder's name cannot tell apart get a digest
    assert names("eval.max_rows=4,8", "data.max_rows=16,32")[0] == "data.max_rows16_eval.max_rows4"
    alike = names("method.target_modules=[q_proj],[q-proj]")
    assert len(set(alike)) == 2
    long = names("method.target_modules=[" + ",".join(["q_proj"] * 30) + "],[v_proj]")
    assert len(long[0]) < 100


def test_a_sweep_over_what_does_not_change_the_result_has_a_folder_and_runs_of_its_own() -> None:
    tiny = ["debug=tiny", "data.max_length=512"]
    tokens, stages = plan_sweep([*tiny, "batch.micro_tokens=1024,2048"]), plan_sweep([*tiny, "zero=stage0,stage2"])
    more = plan_sweep([*tiny, "batch.micro_tokens=512,1024"])
    assert len({tokens[0], stages[0], more[0]}) == 3
    for folder, trials in (tokens, stages, more):
        assert len({trial.folder for trial in trials}) == 2
        assert {trial.folder.parent for trial in trials} == {folder}
    assert plan_sweep([*tiny, "method.r=4,8"])[0] == plan_sweep([*tiny, "method.r=4,8", "batch.micro_tokens=2048"])[0]


def test_its_own_name_and_group_are_kept() -> None:
    folder, trials = plan_sweep(
        ["debug=tiny", "method.r=4,8", "run.name=mine", "run.dir=elsewhere", "log.group=theirs"]
    )
    assert folder == Path("elsewhere/mine")
    assert trials[0].folder == Path("elsewhere/mine/r4")
    assert trials[0].config.log.group == "theirs"


def test_the_name_in_a_runs_config_is_not_the_sweeps(tmp_path: Path) -> None:
    from trainer.config import to_yaml

    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(load(["debug=tiny", "run.name=old"])))
    folder, trials = plan_sweep(["method.r=4,8"], file)
    assert folder.name.startswith("sweep-")
    assert trials[1].config.method.r == 8


@pytest.mark.parametrize(
    "overrides", [["method.r=4"], ["method.r=4,-8"], ["method.rr=4,8"], ["method.r=4,8", "run.name=a/b"]]
)
def test_nothing_starts_when_a_config_is_wrong(stand_in: Path, overrides: list[str]) -> None:
    with pytest.raises(ConfigError):
        run_sweep(["debug=tiny", *overrides])
    assert trained(stand_in) == []


@pytest.mark.slow
def test_a_trial_is_finished_by_its_result_not_by_how_it_was_computed(stand_in: Path) -> None:
    typed = ["debug=tiny", "method.r=4", "data.max_length=512"]
    assert run_sweep([*typed, "batch.micro_tokens=1024,2048", "run.name=s"]) == 0
    assert trained(stand_in) == ["micro_tokens1024", "micro_tokens2048"]
    assert run_sweep([*typed, "batch.micro_tokens=1024,2048", "run.name=s", "zero=stage3", "data.workers=2"]) == 0
    assert len(trained(stand_in)) == 2
    assert run_sweep([*typed, "batch.micro_tokens=1024,2048", "run.name=s", "method.r=8"]) == 0
    assert len(trained(stand_in)) == 4, "a finished r=4 is not r=8"


@pytest.mark.slow
def test_a_failure_is_logged_and_the_others_are_ranked(
    stand_in: Path, capsys: pytest.CaptureFixture[str], logged: list[str]
) -> None:
    assert run_sweep(["debug=tiny", "method.r=4,16,8", "run.name=s", "sweep.fuse=off"]) == 1
    assert trained(stand_in) == ["r4", "r16", "r8"]
    shown = capsys.readouterr()
    assert any("row 3 | is empty" in line for line in logged)
    lines = shown.out.splitlines()
    assert lines[0].split() == [
        *("rank", "r", "alpha", "trainable_parameters", "eval_loss"),
        *("train_loss", "exact_match", "seconds", "status", "folder"),
    ]
    assert lines[1].split() == ["1", "8", "16", "8,000", "2.2000", "1.0000", "0.2500", "2.5", "finished", "runs/s/r8"]
    assert lines[2].split()[:2] == ["2", "4"]
    assert lines[3].split()[0] == "-"
    with (stand_in / "runs/s/sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["rank"], row["method.r"], row["method.alpha"], row["status"]) for row in rows] == [
        ("1", "8", "16", "finished"),
        ("2", "4", "8", "finished"),
        ("", "16", "32", "failed"),
    ]
    assert float(rows[0]["eval_loss"]) == pytest.approx(2.2)
    markdown = (stand_in / "runs/s/sweep.md").read_text().splitlines()
    assert len({line.count(" | ") for line in markdown[:5]}) == 1
    assert "row 3 | is empty" in markdown[-1]


@pytest.mark.slow
def test_started_again_it_does_what_is_left(stand_in: Path) -> None:
    run_sweep(["debug=tiny", "method.r=4,16", "run.name=s", "sweep.fuse=off"])
    (stand_in / "mended").touch()
    assert run_sweep(["debug=tiny", "method.r=4,16,8", "run.name=s", "sweep.fuse=off"]) == 0
    assert trained(stand_in) == ["r4", "r16", "r16", "r8"]
    # another config under the same name is not taken for done
    assert run_sweep(["debug=tiny", "method.r=4,16", "run.name=s", "sweep.fuse=off", "run.seed=1"]) == 0
    assert trained(stand_in)[4:] == ["r4", "r16"]


@pytest.mark.slow
def test_a_killed_trial_is_a_failed_one(stand_in: Path, logged: list[str]) -> None:
    assert run_sweep(["debug=tiny", "method.r=5,4", "run.name=s", "sweep.fuse=off"]) == 1
    assert trained(stand_in) == ["r5", "r4"]
    assert any("SIGKILL" in line for line in logged)


@pytest.mark.slow
def test_stopped_it_leaves_the_rest_for_later(stand_in: Path) -> None:
    (stand_in / "stop").touch()
    arguments = ["debug=tiny", "method.r=4,8", "run.name=s", "sweep.fuse=off"]
    code = "import functools, sys, launch.sweep.sweep as sweep;"
    code += f"sweep.Crew = functools.partial(sweep.Crew, forks=False); sys.exit(sweep.run_sweep({arguments}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", code], cwd=stand_in, env=environment, capture_output=True, text=True)
    assert ended.returncode == 75, ended.stderr
    assert trained(stand_in) == ["r4"]
    assert "preempted" in ended.stdout
    assert "not run" in ended.stdout


def test_ranking_by_train_loss_where_a_run_has_no_eval_loss(stand_in: Path) -> None:
    _, trials = plan_sweep(["debug=tiny", "method.r=2,4,8", "run.name=s"])
    for trial, (eval_loss, train_loss) in zip(trials, [(1.0, 3.0), (None, 2.0), (0.5, float("nan"))], strict=True):
        trial.folder.mkdir(parents=True)
        metrics = {} if eval_loss is None else {"eval_loss": eval_loss}
        summary = {"status": "finished", "train_loss": train_loss, "metrics": metrics}
        (trial.folder / "summary.json").write_text(json.dumps(summary))
    records = ranking.rank(trials, {})
    assert [record["method.r"] for record in records] == [4, 2, 8]
    assert "exact_match" not in records[0]


SCORED = {
    2: {"eval_loss": 0.25, "exact_match": 0.25, "chrf": 10.0, "eval_perplexity": 1.28},
    4: {"eval_loss": 0.75, "exact_match": 0.75, "chrf": 20.0, "eval_perplexity": 2.12},
    8: {"eval_loss": 0.5, "exact_match": 0.5, "chrf": float("nan"), "eval_perplexity": 1.65},
}


@pytest.mark.parametrize(
    ("asked", "order"),
    [
        ("eval.best_metric=null", [2, 8, 4]),
        ("eval.best_metric=exact_match", [4, 8, 2]),
        ("eval.best_metric=chrf", [4, 2, 8]),
        ("eval.best_metric=eval_perplexity", [2, 8, 4]),
    ],
)
def test_ranking_by_the_trials_own_best_metric(stand_in: Path, asked: str, order: list[int]) -> None:
    metrics = ["eval.metrics=[loss,exact_match,chrf]", "eval.every_steps=2"]
    _, trials = plan_sweep(["debug=tiny", "method.r=2,4,8", "run.name=s", *metrics, asked])
    for trial in trials:
        trial.folder.mkdir(parents=True)
        summary = {"status": "finished", "train_loss": 1.0, "metrics": SCORED[trial.config.method.r]}
        (trial.folder / "summary.json").write_text(json.dumps(summary))
    records = ranking.rank(trials, {})
    assert [record["method.r"] for record in records] == order
    assert [record["rank"] for record in records] == [1, 2, 3]
    for record in records:
        scores = {name: record[name] for name in ("exact_match", "chrf")}
        expected = SCORED[record["method.r"]]
        assert str(scores) == str({name: expected[name] for name in scores})
        assert ("eval_perplexity" in record) == (asked == "eval.best_metric=eval_perplexity")
        assert not {"f1", "rouge_l", "choice_accuracy"} & set(record), "no run has them"


def test_a_swept_best_metric_is_ranked_by_the_loss(stand_in: Path) -> None:
    keys = ["eval.metrics=[loss,exact_match]", "eval.every_steps=2", "eval.best_metric=eval_loss,exact_match"]
    _, trials = plan_sweep(["debug=tiny", "run.name=s", *keys])
    for trial, loss in zip(trials, (0.5, 0.25), strict=True):
        trial.folder.mkdir(parents=True)
        metrics = {"eval_loss": loss, "exact_match": loss}
        (trial.folder / "summary.json").write_text(json.dumps({"status": "finished", "metrics": metrics}))
    assert [record["eval_loss"] for record in ranking.rank(trials, {})] == [0.25, 0.5]


def test_the_rank_group_shows_what_it_sets() -> None:
    _, trials = plan_sweep(["debug=tiny", "rank=tiny,small"])
    records = ranking.rank(trials, {})
    assert [(record["method.r"], record["method.alpha"]) for record in records] == [(8, 16), (16, 32)]
    assert [trial.name for trial in trials] == ["rank-tiny", "rank-small"]
