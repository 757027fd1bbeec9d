"""The commands as users type them, on the tiny model: what they leave behind, and what a cut run comes back to."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import processes
from tests.helpers.processes import stop_tree, torchrun
from tests.helpers.warm import afina
from trainer.tracking.files import read_metrics, read_summary

STEPS = 8
METRIC_KEYS = {
    *("step", "epoch", "loss", "grad_norm", "learning_rate", "label_tokens", "useful_tokens", "computed_tokens"),
    *("useful_tokens_per_second", "step_seconds", "data_seconds", "peak_memory_bytes"),
    *("model_flops_utilization", "useful_flops_utilization"),
}


@pytest.fixture(scope="module")
def work(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def finished(work: Path) -> Path:
    """An undisturbed run of the tiny recipe, started as users start it."""
    processes.afina("train", "debug=tiny", "run.name=straight", "checkpoint.every_steps=2", cwd=work)
    return work / "runs" / "straight"


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def same_adapter(one: Path, other: Path) -> bool:
    a, b = adapter(one), adapter(other)
    return set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in a)


def test_run_folder_is_the_contract(finished: Path) -> None:
    summary = read_summary(finished)
    assert summary is not None
    assert summary["status"] == "finished"
    assert summary["steps"] == STEPS
    assert summary["error"] is None
    assert summary["trainable_parameters"] < summary["total_parameters"]
    records = read_metrics(finished)
    assert [r["step"] for r in records] == list(range(STEPS + 1))
    assert all(set(r) >= METRIC_KEYS for r in records[1:])
    assert records[0]["eval_loss"] == summary["metrics"]["eval_loss_before"]
    assert records[-1]["eval_loss"] == summary["metrics"]["eval_loss"]
    assert records[-1]["loss"] == summary["train_loss"]
    assert all(math.isfinite(r["loss"]) for r in records[1:])
    assert all(0 < r["model_flops_utilization"] < 1 for r in records[1:])
    environment = json.loads((finished / "environment.json").read_text())
    assert "torch" in json.dumps(environment)
    for name in ("config.yaml", "log.txt", "adapter/adapter_config.json", "adapter/tokenizer.json"):
        assert (finished / name).exists(), name
    kept = sorted(f.name for f in (finished / "checkpoints").iterdir())
    assert kept == ["step-00000006", "step-00000008"]


def test_finished_run_is_not_redone(finished: Path, work: Path) -> None:
    before = {f: f.stat().st_mtime_ns for f in finished.rglob("*") if f.is_file()}
    again = afina("train", "debug=tiny", "run.name=straight", "checkpoint.every_steps=2", cwd=work)
    assert "nothing is redone" in again.output
    assert {f: f.stat().st_mtime_ns for f in finished.rglob("*") if f.is_file()} == before
    other = afina("train", "debug=tiny", "run.name=straight", "method.r=4", cwd=work, check=False)
    assert other.returncode == 2
    assert "method.r 16 → 4" in other.output
    assert "Traceback" not in other.output


def test_config_repeats_the_run_and_overwrite_moves_it_aside(finished: Path, work: Path) -> None:
    config = finished / "config.yaml"
    afina("train", "--config", config, "run.name=repeated", cwd=work)
    assert same_adapter(work / "runs" / "repeated", finished)
    afina("train", "--config", config, "run.name=repeated", "run.overwrite=true", "batch.max_steps=2", cwd=work)
    folders = sorted(f.name for f in (work / "runs").glob("repeated*"))
    assert len(folders) == 2
    assert len(read_metrics(work / "runs" / "repeated")) == 3


def test_eval_and_generate_use_what_was_trained(finished: Path, work: Path) -> None:
    out = afina("eval", finished, cwd=work).output
    summary = read_summary(finished)
    assert summary is not None
    assert f"{summary['metrics']['eval_loss']:.4f}" in out
    sampled = ["generate.do_sample=true", "generate.temperature=0.8", "generate.top_p=0.9", "generate.max_new_tokens=9"]
    with_adapter = afina("generate", finished, "Is it?", *sampled, cwd=work)
    without = afina("generate", finished, "Is it?", "--no-adapter", "--bits", "4", cwd=work)
    assert with_adapter.output.strip().splitlines()[-1] != without.output.strip().splitlines()[-1]


def start(work: Path, name: str, *overrides: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "trainer.train", "debug=tiny", f"run.name={name}", "checkpoint.every_steps=2"]
    return subprocess.Popen([*command, *overrides], cwd=work, stdout=subprocess.DEVNULL, start_new_session=True)


def wait_for_step(run: Path, step: int, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if (run / "metrics.jsonl").exists() and max((r["step"] for r in read_metrics(run)), default=0) >= step:
            return
        assert process.poll() is None, "the run ended before it could be disturbed"
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached in {seconds} s")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_cut_short_and_started_again_ends_the_same(work: Path, number: signal.Signals) -> None:
    """Long enough that the signal lands in the middle; a line a step, and the adapter of an undisturbed run."""
    longer = (
        *("batch.epochs=20", "batch.max_steps=150", "eval.metrics=[loss]", "generate.max_new_tokens=64"),
        *("optim.learning_rate=0.02", "eval.every_steps=10", "eval.best_metric=eval_loss", "checkpoint.keep=1"),
    )
    straight = work / "runs" / "undisturbed"
    if not straight.exists():
        # 75 checkpoints, each synced: minutes where others share the disk
        whole = ("train", "debug=tiny", "run.name=undisturbed", "checkpoint.every_steps=2", *longer)
        afina(*whole, cwd=work, timeout_seconds=500)
    run = work / "runs" / f"cut-{number.name}"
    process = start(work, run.name, *longer)
    try:
        wait_for_step(run, 11, process)
        process.send_signal(number)
        code = process.wait(60)
    finally:
        stop_tree(process)
    summary = read_summary(run)
    if number == signal.SIGTERM:
        assert code == 75
        assert summary is not None
        assert summary["status"] == "preempted"
    else:
        assert summary is None
    again = afina("train", "debug=tiny", f"run.name={run.name}", "checkpoint.every_steps=2", *longer, cwd=work)
    assert "resumed after step" in again.output
    assert [r["step"] for r in read_metrics(run)] == list(range(151))
    assert same_adapter(run, straight)
    losses = [[r["loss"] for r in read_metrics(folder)[1:]] for folder in (run, straight)]
    assert losses[0] == losses[1]
    ends: list[Any] = [read_summary(folder) for folder in (run, straight)]
    assert ends[0]["best_step"] == ends[1]["best_step"] < 150, "the best is not the last, or nothing is put back"
    assert ends[0]["metrics"] == ends[1]["metrics"]
    assert f"step {ends[0]['best_step']} of 150: its weights are kept" in again.output


def test_torchrun_makes_one_folder_and_one_wandb_run(work: Path) -> None:
    torchrun("trainer.train", "debug=tiny", "run.name=two", "run.dir=by-hand", nproc=2, cwd=work)
    assert sorted(f.name for f in (work / "by-hand").iterdir()) == [".two.lock", "two"]
    assert len(list((work / "by-hand" / "two" / "wandb").glob("*run-*/*.wandb"))) == 1
    summary = read_summary(work / "by-hand" / "two")
    assert summary is not None
    assert summary["status"] == "finished"


def test_all_weights_give_a_plain_model_folder(work: Path) -> None:
    out = afina("train", "debug=tiny", "method=full", "rank=null", "zero=stage3", "launch=torchrun",
                "launch.nproc_per_node=2", "run.name=full", cwd=work)  # fmt: skip
    assert "finished" in out.output
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = work / "runs" / "full" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model(**AutoTokenizer.from_pretrained(folder)("hello", return_tensors="pt")).logits.isfinite().all()
    summary: Any = read_summary(work / "runs" / "full")
    assert summary["trainable_parameters"] == summary["total_parameters"]
    assert f"{summary['metrics']['eval_loss']:.4f}" in afina("eval", work / "runs" / "full", cwd=work).output


def test_sweep_ranks_the_trials_and_reports_the_failed(work: Path) -> None:
    out = afina("sweep", "debug=tiny", "run.name=grid", "optim.learning_rate=1e-3,1e30",
                "optim.max_grad_norm=0", cwd=work, check=False)  # fmt: skip
    assert out.returncode == 1
    table = (work / "runs" / "grid" / "sweep.csv").read_text()
    assert table.count("finished") == 1
    assert table.count("failed") == 1
    assert "not finite" in out.output


@pytest.mark.parametrize(
    ("override", "told"),
    [("metod=lora", "method"), ("method.rr=8", "method.r"), ("data.path=nowhere.jsonl", "nowhere.jsonl")],
)
def test_a_wrong_word_is_one_line(work: Path, override: str, told: str) -> None:
    out = afina("train", override, cwd=work, check=False)
    assert out.returncode == 2
    assert len(out.output.strip().splitlines()) == 1
    assert told in out.output


def test_a_metric_that_the_data_cannot_have_is_told_before_training(work: Path) -> None:
    out = afina("train", "debug=tiny", "eval.metrics=[choice_accuracy]", "eval.before=false", cwd=work, check=False)
    assert out.returncode == 2
    assert "no held-out row has any" in out.output
    assert "step 1/" not in out.output
