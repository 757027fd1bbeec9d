"""The life of a group of trials: killed, stopped, failed in parts, ended in parts. Each trial ends as a run by itself,
and a group that was cut ends with the bits of one that was not."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.sweep.halving import Halving
from launch.sweep.space import read_space
from launch.trials import Trial
from tests.helpers.read_trackers import assert_has_all, from_metrics_file
from tests.helpers.reference import mean_loss
from tests.helpers.together import COMMON, assert_as_alone, assert_same_bits, status, summary, train, write_group
from tests.helpers.wandb_runs import history_of, offline_files
from trainer.checkpoint.owner import own_run, show_owner
from trainer.config import load
from trainer.tracking.files import read_metrics
from trainer.tracking.wandb_file import read_records

TRIALS: dict[str, Sequence[str]] = {
    "r4": ["method.r=4"],
    "short": ["method.r=8", "batch.max_steps=3", "method.seed=3"],
    "attention": ["method.r=8", "method.target_modules=attention", "optim.learning_rate=0.002"],
}


@pytest.fixture(scope="module")
def work(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("life")


@pytest.fixture(scope="module")
def alone(work: Path) -> Path:
    """The trials as runs by themselves."""
    train("alone", write_group(work / "alone", TRIALS))
    return work / "alone"


@pytest.fixture(scope="module")
def undisturbed(work: Path) -> Path:
    train("together", write_group(work / "undisturbed", TRIALS))
    return work / "undisturbed"


def test_a_group_leaves_what_runs_by_themselves_leave(undisturbed: Path, alone: Path) -> None:
    assert_as_alone(undisturbed, alone, list(TRIALS))
    for name in TRIALS:
        found, expected = (summary(where / name) for where in (undisturbed, alone))
        assert found.pop("together") == {"group": "group", "trials": 3}
        assert found.keys() == expected.keys()
        times = [line["elapsed_seconds"] for line in read_metrics(undisturbed / name)[1:]]
        assert times == sorted(set(times))


KILLS = {
    "in a step": {"point": "reduce", "step": 4, "nth": 1},
    "between two checkpoints": {"point": "committed", "step": 4, "nth": 1},
    "before the marker": {"point": "before the marker", "step": 4, "nth": 1},
    "after the marker": {"point": "marked", "step": 3, "nth": 1},
    "after one has ended": {"point": "ended", "step": 3, "nth": 1},
}


@pytest.mark.parametrize("kill", KILLS)
def test_a_killed_group_ends_with_the_same_bits(kill: str, undisturbed: Path, tmp_path: Path) -> None:
    file = write_group(tmp_path, TRIALS)
    train("together", file, code=-9, action="kill", **KILLS[kill])
    train("together", file)
    assert_same_bits(tmp_path, undisturbed, list(TRIALS))


def test_two_ranks_that_are_killed_end_with_the_same_bits(tmp_path: Path) -> None:
    for folder in ("straight", "killed"):
        file = write_group(tmp_path / folder, TRIALS, "zero=stage2")
        if folder == "killed":
            train("together", file, code=-9, nproc=2, action="kill", **KILLS["between two checkpoints"])
        train("together", file, nproc=2)
    assert_same_bits(tmp_path / "killed", tmp_path / "straight", list(TRIALS))


@pytest.mark.parametrize("stage", ["forward and backward", "evaluate"])
def test_a_stopped_group_is_continued_together_or_trial_by_trial(
    stage: str, undisturbed: Path, alone: Path, tmp_path: Path
) -> None:
    file = write_group(tmp_path / "group", TRIALS)
    train("together", file, code=75, action="term", point=stage, step=3, nth=1)
    for name in TRIALS:
        found = summary(tmp_path / "group" / name)
        assert [found[key] for key in ("status", "steps", "stopped_by")] == ["preempted", 3, "SIGTERM"]
    shutil.copytree(tmp_path / "group", tmp_path / "apart")
    train("together", file)
    assert_same_bits(tmp_path / "group", undisturbed, list(TRIALS))
    train("alone", write_group(tmp_path / "apart", TRIALS))
    assert_as_alone(tmp_path / "apart", alone, list(TRIALS))


def test_a_trial_that_is_not_finite_fails_by_itself(alone: Path, tmp_path: Path) -> None:
    trials = {"wild": ["method.r=4", "optim.learning_rate=1e30"], **TRIALS}
    file = write_group(tmp_path / "straight", trials, "fault.non_finite=stop")
    train("together", file)
    failed = summary(tmp_path / "straight" / "wild")
    assert (failed["status"], failed["steps"], failed["error"]["kind"]) == ("failed", 1, "training")
    assert failed["error"]["message"].startswith("step 2, rank 0: the loss is not finite")
    assert "headlines" in failed["error"]["message"], "the rows are named"
    assert_as_alone(tmp_path / "straight", alone, list(TRIALS))
    file = write_group(tmp_path / "killed", trials, "fault.non_finite=stop")
    train("together", file, code=-9, action="kill", point="reduce", step=5, nth=1)
    train("together", file)
    assert summary(tmp_path / "killed" / "wild")["error"]["message"].startswith(
        "step 2, rank 0: the loss is not finite"
    )
    assert_same_bits(tmp_path / "killed", tmp_path / "straight", list(TRIALS))


def test_a_step_that_is_not_finite_is_left_out_of_its_trial_alone(alone: Path, tmp_path: Path) -> None:
    names = ["attention", "r4", "short"]
    trials = {name: TRIALS[name] for name in names}
    spoiled = {"trial_0": [3]}
    one = write_group(tmp_path / "alone", {"attention": TRIALS["attention"]}, "fault.non_finite=skip")
    train("alone", one, spoiled=spoiled)
    assert summary(tmp_path / "alone" / "attention")["skipped_steps"] == 1
    file = write_group(tmp_path / "straight", trials, "fault.non_finite=skip")
    train("together", file, spoiled=spoiled)
    assert_as_alone(tmp_path / "straight", tmp_path / "alone", ["attention"])
    assert_as_alone(tmp_path / "straight", alone, ["r4", "short"])
    file = write_group(tmp_path / "killed", trials, "fault.non_finite=skip")
    # the marker of step 3 is not written: step 3 is made once more, without the cause of its failure
    train("together", file, code=-9, action="kill", point="before the marker", step=3, nth=1, spoiled=spoiled)
    train("together", file)
    assert_same_bits(tmp_path / "killed", tmp_path / "straight", names)


def test_patience_ends_one_trial_and_best_weights_come_back(tmp_path: Path) -> None:
    uneven = ["method.r=8", "optim.learning_rate=0.03", "optim.eps=0.001", "schedule=constant"]
    uneven += ["eval.best_metric=eval_loss"]
    trials = {
        "plain": ["method.r=4"],
        "impatient": [*uneven, "eval.patience=1"],
        "best": [*uneven, "batch.max_steps=7"],
    }
    more = ["eval.every_steps=1", "batch.max_steps=8"]
    train("alone", write_group(tmp_path / "alone", trials, *more))
    train("together", write_group(tmp_path / "group", trials, *more))
    ended = {name: summary(tmp_path / "group" / name) for name in trials}
    assert ended["impatient"]["steps"] < 8, "patience was tried"
    assert ended["best"]["best_step"] < 7, "the last weights were not the best"
    assert_as_alone(tmp_path / "group", tmp_path / "alone", list(trials))


def test_trials_leave_a_group_and_join_one(alone: Path, tmp_path: Path) -> None:
    """One joins from a checkpoint of its own, ahead of the others; one stops on the way and goes on by itself."""
    train("alone", write_group(tmp_path, {"attention": [*TRIALS["attention"], "run.stop_at_step=3"]}), code=75)
    train("together", write_group(tmp_path, {**TRIALS, "r4": [*TRIALS["r4"], "run.stop_at_step=4"]}))
    stopped = summary(tmp_path / "r4")
    assert [stopped[key] for key in ("status", "steps", "stopped_by")] == ["preempted", 4, "run.stop_at_step"]
    assert_as_alone(tmp_path, alone, ["short", "attention"])
    train("alone", write_group(tmp_path, {"r4": TRIALS["r4"]}))
    assert_as_alone(tmp_path, alone, ["r4"])


def test_a_trial_that_has_taken_more_steps_than_asked_for_ends(tmp_path: Path) -> None:
    long = ["method.r=4", "batch.max_steps=6", "run.stop_at_step=4"]
    for how in ("alone", "together"):
        train("alone", write_group(tmp_path / how, {"long": long}), code=75)
        trials = {"long": ["method.r=4", "batch.max_steps=3"], "short": TRIALS["short"]}
        train(how, write_group(tmp_path / how, trials))
    assert_as_alone(tmp_path / "together", tmp_path / "alone", ["long", "short"])


ENDS = (1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 7)


@pytest.fixture(scope="module")
def many() -> dict[str, Sequence[str]]:
    return {
        f"t{place}": [f"method.r={2 + place}", f"batch.max_steps={end}", f"method.seed={place}"]
        for place, end in enumerate(ENDS)
    }


def test_twelve_trials_become_one(many: dict[str, Sequence[str]], tmp_path: Path) -> None:
    more = ["eval.every_steps=0", "eval.before=false", "checkpoint.every_steps=0", "optim.eps=0.001"]
    train("alone", write_group(tmp_path / "alone", many, *more, *PADDED, "zero=stage0"))
    for stage in ("stage0", "stage2", "stage3"):
        folder = tmp_path / stage
        train("together", write_group(folder, many, *more, f"zero={stage}"))
        assert_as_alone(folder, tmp_path / "alone", list(many))


NINE = {
    f"n{rank}": [f"method.r={rank}", f"optim.learning_rate={rate}"]
    for rank, rate in zip(range(2, 11), (0.001, 0.02, 1e30, 0.01, 0.0005, 0.008, 0.015, 0.002, 0.005), strict=True)
}
HALVED = ("batch.max_steps=8", "eval.every_steps=2", "eval.before=false", "fault.non_finite=stop")
PADDED = ("batch.packing=padded", "model.kernels=none")  # nothing to verify at the start
LEFT = "sweep.early_stopping"
RULES = {"min_steps": 2, "reduction_factor": 3, "metric": "eval_loss", "lower_is_better": True}


def halved_from_outside(folder: Path) -> dict[str, int]:
    """Train the nine by themselves from rung to rung, as a sweep without groups; return who ended at which step."""
    typed = [*COMMON, *HALVED, f"run.dir={folder}", "method.r=2,3", "sweep.early_stopping=asha"]
    space = read_space([*typed, "sweep.min_steps=2", "sweep.reduction_factor=3", "sweep.metric=eval_loss"])
    trials = [
        Trial(name, [], {}, load([*COMMON, *HALVED, f"run.dir={folder}", f"run.name={name}", *keys]))
        for name, keys in NINE.items()
    ]
    halving = Halving(space, trials)
    while due := halving.next_round():
        stops = {trial.name: [f"run.stop_at_step={trial.stop_at_step or 'null'}"] for trial in due}
        file = write_group(folder, {name: [*NINE[name], *stop] for name, stop in stops.items()}, *HALVED, *PADDED)
        train("alone", file, code=75 if due[0].stop_at_step else 0)
        halving.decide({name for name in NINE if status(folder / name) == "failed"})
    return {name: summary(folder / name)["steps"] for name in NINE}


def test_halving_inside_a_group_keeps_whom_a_sweep_keeps(tmp_path: Path) -> None:
    expected = halved_from_outside(tmp_path / "outside")
    assert sorted(expected.values()) == [1] + [2] * 6 + [6, 8]  # of eight that have not failed two go on, then one
    ends = {1: ("failed", None), 2: ("preempted", LEFT), 6: ("preempted", LEFT), 8: ("finished", None)}

    def ended(folder: Path) -> dict[str, list[Any]]:
        return {name: [summary(folder / name)[key] for key in ("steps", "status", "stopped_by")] for name in NINE}

    straight, failed = tmp_path / "straight", tmp_path / "failed"
    train("together", write_group(straight, NINE, *HALVED, halving=RULES))
    assert ended(straight) == {name: [steps, *ends[steps]] for name, steps in expected.items()}
    (best,) = (name for name, steps in expected.items() if steps == 8)
    assert_as_alone(straight, tmp_path / "outside", [best])
    file = write_group(failed, NINE, *HALVED, halving=RULES)
    # the common save is that of the second rung, and the first one's choice is made again
    train("together", file, code=1, action="raise", point="reduce", step=7, nth=1)
    assert ended(failed) == {**ended(straight), best: [6, "failed", None]}
    train("together", file)
    assert ended(failed) == ended(straight)
    assert_same_bits(failed, straight, [best])


def test_trackers_of_each_trial_have_its_numbers(tmp_path: Path) -> None:
    trackers = "log.trackers=[wandb,tensorboard,mlflow]"
    train("together", write_group(tmp_path, TRIALS, trackers, "log.wandb=offline"))
    for name in TRIALS:
        folder = tmp_path / name
        for tracker in ("tensorboard", "mlflow"):
            assert_has_all(folder, tracker)
        (file,) = offline_files(folder)
        assert history_of(list(read_records(file))) == from_metrics_file(folder)


def test_the_adapters_are_stock_peft_adapters(undisturbed: Path, tiny_model: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from trainer.data.load import load_data
    from trainer.models.loading import load_tokenizer

    for name in TRIALS:
        config = load([], undisturbed / name / "config.yaml")
        held_out = load_data(config, load_tokenizer(str(tiny_model), config.model)).validation
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, undisturbed / name / "adapter").eval()
        with torch.no_grad():
            found = float(mean_loss(model, held_out.examples(range(8))))
        assert found == pytest.approx(summary(undisturbed / name)["metrics"]["eval_loss"], rel=1e-5)


def test_what_is_finished_or_anothers_stays_as_it_is(alone: Path, tmp_path: Path) -> None:
    shutil.copytree(alone / "short", tmp_path / "short")
    short = contents(tmp_path / "short")
    file = write_group(tmp_path, TRIALS)
    with own_run(tmp_path / "attention"):
        (tmp_path / "attention").mkdir()
        with show_owner(tmp_path / "attention"):
            refused = train("together", file, code=4)
    assert f"{tmp_path / 'attention'}" in refused.output.replace("\n", "")
    assert "is being trained by" in refused.output
    train("together", file)
    assert_as_alone(tmp_path, alone, list(TRIALS))
    assert contents(tmp_path / "short") == short
    before = contents(tmp_path)
    train("together", file)
    assert contents(tmp_path) == before


def contents(folder: Path) -> dict[Path, int]:
    """When each file was written, but for locks."""
    return {f: f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file() and f.suffix != ".lock"}
