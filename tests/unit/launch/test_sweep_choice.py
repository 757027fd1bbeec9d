"""Which trials a sweep has: those of its config group, drawn ones, and those that results choose."""

from __future__ import annotations

import csv
import json
import math
import shlex
from pathlib import Path

import pytest
import yaml

import launch.sweep.fusing
import launch.trials
import trainer.cli.app
from launch.crew import Crew
from launch.sweep.fusing import trials_at_once
from launch.sweep.plan import plan_sweep
from launch.sweep.space import read_space
from launch.sweep.sweep import run_sweep
from launch.sweep.wandb_file import wandb_sweep
from launch.trials import Trial
from tests.helpers.trials import stand_in
from trainer.config import load, to_yaml
from trainer.errors import ConfigError

TINY = ["debug=tiny", "eval.metrics=[loss]"]
RATES = "optim.learning_rate=tag(log,interval(1e-5,1e-2))"


def names(*typed: str) -> list[str]:
    return [trial.name for trial in plan_sweep([*TINY, *typed])[1]]


def test_a_group_brings_its_axes_and_what_is_typed_replaces_or_adds() -> None:
    assert len(names("sweep=rank_alpha")) == 12
    assert names("sweep=rank_alpha", "method.alpha=16") == ["r8", "r16", "r32", "r64"]
    assert names("sweep=rank_alpha", "method.r=2,4", "method.alpha=8,16") == [
        *("r2_alpha8", "r2_alpha16", "r4_alpha8", "r4_alpha16"),
    ]
    assert len(names("sweep=rank_alpha", "run.seed=1,2")) == 24
    assert names("sweep.axes={method.r: '4,8'}") == ["r4", "r8"]


def test_alpha_follows_the_rank() -> None:
    trials = plan_sweep([*TINY, "sweep=alpha_as_multiple_of_rank", "rank=tiny,small"])[1]
    assert {(trial.config.method.r, trial.config.method.alpha) for trial in trials} == {
        (r, r * multiple) for r in (8, 16, 32) for multiple in (1, 2, 4)
    }
    assert names("sweep.alpha_over_rank=[0.5,2]", "method.r=4,8") == [
        "r4_alpha2",
        "r4_alpha8",
        "r8_alpha4",
        "r8_alpha16",
    ]


def test_a_trial_is_a_single_run() -> None:
    for trial in plan_sweep([*TINY, "sweep=targets", "sweep.seed=3"])[1]:
        assert not any(override.startswith("sweep") for override in trial.overrides)
        assert load(trial.overrides) == trial.config


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("method.r=4", "sweep=rank_alpha"),
        ("sweep.seed=1,2 method.r=4,8", "has one value"),
        ("sweep.alpha_over_rank=[1,2] method.alpha=4,8", "swept itself"),
        ("sweep.alpha_over_rank=[1,2] method=ia3", "this method has none"),
        (f"sweep.sampler=tpe {RATES}", "cannot be planned"),
        ("sweep.early_stopping=asha sweep.min_steps=2 method.r=4,8", "cannot be planned"),
        (RATES, "sweep.sampler=random"),
    ],
)
def test_what_cannot_be_planned(typed: str, told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        plan_sweep([*TINY, *typed.split()])
    assert told in str(refused.value)


def test_a_sweeps_group_is_refused_for_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert trainer.cli.app.main(["train", *TINY, "sweep=rank_alpha"]) == 2
    assert "afina sweep" in capsys.readouterr().err


def test_a_dry_run_shows_what_is_chosen_later(capsys: pytest.CaptureFixture[str]) -> None:
    assert trainer.cli.app.main(["sweep", *TINY, "sweep.sampler=tpe", RATES, "method.r=4,8", "--dry-run"]) == 0
    head, *axes, fused = capsys.readouterr().out.splitlines()
    assert head.startswith("# sweep of 20 runs in runs/sweep-")
    assert fused.startswith("# each alone: sweep.fuse=N would choose N at a time")
    assert len(axes) == 2
    early = ["sweep.early_stopping=asha", "sweep.min_steps=2"]
    assert trainer.cli.app.main(["sweep", *TINY, *early, "method.r=4,8", "--dry-run"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_random_draws_the_same_again_each_once_and_within_bounds() -> None:
    typed = ["sweep.sampler=random", "sweep.trials=12", RATES, "method.r=4,8,16"]
    folder, trials = plan_sweep([*TINY, *typed])
    assert plan_sweep([*TINY, *reversed(typed)])[0] == folder
    assert [trial.name for trial in trials] == names(*typed) != names(*typed, "sweep.seed=1")
    assert len({trial.folder for trial in trials}) == 12
    rates = [trial.config.optim.learning_rate or 0 for trial in trials]
    assert all(1e-5 <= rate <= 1e-2 for rate in rates)
    assert 3 <= sum(rate < 3e-4 for rate in rates) <= 9, "evenly over magnitudes"
    assert names(*typed, "sweep.trials=5") == names(*typed)[:5], "more trials are the same and more"
    assert sorted(names("sweep.sampler=random", "method.r=4,8,16")) == ["r16", "r4", "r8"], "there are no more"


def test_at_once() -> None:
    def at_once(*typed: str) -> int:
        return trials_at_once(read_space([*TINY, "method.r=4,8", *typed]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch.sweep.fusing, "visible_gpus", lambda: 0)
        assert (at_once(), at_once("sweep.parallel=3"), at_once("launch=torchrun")) == (1, 3, 1)
        patch.setattr(launch.sweep.fusing, "visible_gpus", lambda: 2)
        assert (at_once(), at_once("sweep.parallel=1"), at_once("launch=torchrun")) == (2, 1, 1)
        with pytest.raises(ConfigError, match="2 can be seen → sweep"):
            at_once("sweep.parallel=3")
        with pytest.raises(ConfigError, match="all devices"):
            at_once("sweep.parallel=2", "launch=torchrun")


class Trainer:
    """Stands in for runs: a learning rate of 1e-3 is the best."""

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.left = math.inf

    def run_trial(self, trial: Trial, *_: object) -> tuple[int, str]:
        if not self.left:
            return 143, ""
        self.left -= 1
        self.trained.append(trial.name)
        rate = trial.config.optim.learning_rate or 1.0
        if trial.config.method.r == 32:
            return 2, "no memory"
        trial.folder.mkdir(parents=True, exist_ok=True)
        (trial.folder / "config.yaml").write_text(to_yaml(trial.config))
        metrics = {"eval_loss": (math.log10(rate) + 3) ** 2, "eval_perplexity": 1.0}
        summary = {"status": "finished", "train_loss": -rate, "metrics": metrics}
        (trial.folder / "summary.json").write_text(json.dumps(summary))
        return 0, ""


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    made = Trainer()
    stand_in(monkeypatch, tmp_path, made.run_trial)
    return made


TPE = [*TINY, "sweep.sampler=tpe", "sweep.trials=24", RATES, "run.name=s"]


def test_tpe_repeats_and_looks_where_it_was_good(runs: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_sweep(TPE) == 0
    once = runs.trained.copy()
    assert len(set(once)) == 24
    drawn = names("sweep.sampler=random", "sweep.trials=24", RATES)

    def near(found: list[str]) -> int:
        return sum(abs(math.log10(float(name.removeprefix("learning_rate"))) + 3) < 0.5 for name in found[10:])

    assert near(once) > near(drawn)
    Path("runs/s").rename("runs/before")
    assert run_sweep(TPE) == 0
    assert runs.trained[24:] == once


def test_a_stopped_tpe_goes_on_as_if_it_had_not_been(runs: Trainer) -> None:
    assert run_sweep(TPE) == 0
    undisturbed = runs.trained.copy()
    Path("runs/s").rename("runs/before")
    runs.trained.clear()
    for left in (1, 6, 9, math.inf):
        runs.left = left
        assert run_sweep(TPE) == (0 if left == math.inf else 143)
    assert runs.trained == undisturbed


def test_tpe_goes_on_after_a_failure_and_ends_where_nothing_is_left(runs: Trainer) -> None:
    assert run_sweep([*TINY, "sweep.sampler=tpe", "method.r=4,8,32", "run.name=s"]) == 1
    assert sorted(runs.trained) == ["r32", "r4", "r8"]
    with Path("runs/s/sweep.csv").open() as file:
        rows = {row["method.r"]: (row["status"], row["error"]) for row in csv.DictReader(file)}
    assert rows == {"4": ("finished", ""), "8": ("finished", ""), "32": ("failed", "no memory")}


def test_a_sweeps_metric_ranks_it(runs: Trainer) -> None:
    grid = [*TINY, "optim.learning_rate=1e-4,1e-3,1e-2", "run.name=s"]
    for typed, order in (
        (grid, ["0.001", "0.0001", "0.01"]),
        ([*grid, "sweep.metric=train_loss"], ["0.01", "0.001", "0.0001"]),
    ):
        assert run_sweep(typed) == 0
        with Path("runs/s/sweep.csv").open() as file:
            assert [row["optim.learning_rate"] for row in csv.DictReader(file)] == order


def test_the_file_for_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    monkeypatch.chdir(tmp_path)
    typed = [
        "sweep",
        *TINY,
        "sweep.sampler=tpe",
        RATES,
        "method.r=4,8",
        "method.target_modules=[q_proj,v_proj],attention",
    ]
    assert trainer.cli.app.main([*typed, "run.name=mine", "log.project=p", "--wandb-file", "s.yaml"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "wandb sweep s.yaml"
    sweep = yaml.safe_load(Path("s.yaml").read_text())
    assert (sweep["method"], sweep["run_cap"], sweep["project"], sweep["name"]) == ("bayes", 20, "p", "mine")
    assert sweep["metric"] == {"name": "eval_loss", "goal": "minimize"}
    assert sweep["parameters"] == {
        "optim.learning_rate": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-2},
        "method.r": {"values": [4, 8]},
        "method.target_modules": {"values": ["[q_proj,v_proj]", "attention"]},
    }
    # as wandb's agent builds the command line of a run
    given = {"optim.learning_rate": 3e-4, "method.r": 4, "method.target_modules": "[q_proj,v_proj]"}
    arguments = create_sweep_command_args({"args": {key: {"value": value} for key, value in given.items()}})
    words = create_sweep_command(sweep["command"])
    command = [w for word in words for w in (arguments["args_no_hyphens"] if word == "${args_no_hyphens}" else [word])]
    assert command[:2] == ["afina", "train"]
    assert trainer.cli.app.main([*command[1:], "--dry-run"]) == 0
    config = load(command[2:])
    assert (config.method.r, config.optim.learning_rate, config.run.name) == (4, 3e-4, None)
    assert config.run.dir == "runs/mine"
    assert shlex.join(command)


@pytest.mark.parametrize("typed", ["sweep.alpha_over_rank=[1,2]", "sweep.early_stopping=asha sweep.min_steps=2"])
def test_what_wandb_cannot_express_is_refused(typed: str) -> None:
    with pytest.raises(ConfigError, match="W&B"):
        wandb_sweep(read_space([*TINY, "method.r=4,8", *typed.split()]))


def test_a_crew_gives_each_trial_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5,7")
    crew = Crew(at_once=2, forks=False)
    with crew._device() as one, crew._device() as two:
        assert [one, two] == [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "GPU-5"}]
    with Crew(at_once=1, forks=False)._device() as alone:
        assert alone == {}
