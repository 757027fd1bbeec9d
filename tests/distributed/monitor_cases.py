"""On two ranks: whole runs that overfit on few rows: the best weights, the early stop, the warning."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.distributed.bench import Bench
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.run_folder import open_run
from trainer.config import TrainConfig
from trainer.data.load import load_data
from trainer.distributed.process_group import barrier
from trainer.models.embedded import resolve
from trainer.models.loading import load_tokenizer
from trainer.tracking.files import read_metrics, read_summary
from trainer.training.finish import save_final
from trainer.training.job import Job
from trainer.training.loop import Loop
from trainer.training.run import run_job
from trainer.training.stop_request import StopRequest

FEW_ROWS = [
    *("data.max_rows=16", "batch.epochs=100", "batch.max_steps=40", "optim.max_grad_norm=1", "optim.weight_decay=0"),
    *("eval.metrics=[loss]", "eval.every_steps=2", "checkpoint.every_steps=3", "checkpoint.keep=1", "log.wandb=off"),
]
BEST = ["eval.best_metric=eval_loss", "eval.patience=2", "eval.overfit_gap=null"]
FULL = ["method=full", "rank=null", "optim.learning_rate=0.003"]
# Its last ranks are taken at step 29, after the best evaluation: the adapter has all that it had then.
ADALORA = ["method=adalora", "method.tinit=1", "method.tfinal=11"]
# Name, overrides, and how many steps after the best one a second run is killed.
BEST_CASES: dict[str, tuple[list[str], int | None]] = {
    "stage0": (["zero=stage0"], None),
    "stage2": (["zero=stage2"], 1),
    "stage3": (["zero=stage3"], 3),
    "full stage3": (["zero=stage3", *FULL], None),
    "adalora stage2": (["zero=stage2", *ADALORA], None),
}


class Killed(BaseException):
    """As sudden as a kill -9, for all that the program does about it."""


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    whole = Loop.step

    def step_or_die(self: Loop, at: int) -> Any:
        if at == step:
            raise Killed
        return whole(self, at)

    with patch.object(Loop, "step", step_or_die):
        yield


def configured(bench: Bench, folder: Path, name: str, *overrides: str) -> TrainConfig:
    return bench.config(*FEW_ROWS, f"run.dir={folder}", f"run.name={name}", *overrides)


def whole_run(bench: Bench, config: TrainConfig) -> Path:
    """What ``trainer.train.train`` does once the process group is up."""
    base = resolve(config.model.name_or_path)
    tokenizer = load_tokenizer(base, config.model)
    data = load_data(config, tokenizer)
    with open_run(config, bench.world, data.total_steps(config.batch), data.fingerprint) as run:
        assert run.finished is None
        job = Job(
            config=config,
            world=bench.world,
            base_dir=base,
            tokenizer=tokenizer,
            data=data,
            run=run,
            stop=StopRequest(),
            begin=time.perf_counter(),
        )
        run_job(job)
        barrier()
        return run.folder


def saved(folder: Path) -> tuple[dict[str, Tensor], Any]:
    """Tensors of an adapter or model folder, and which ranks its AdaLoRA adapter has."""
    (file,) = folder.glob("*.safetensors")
    config = folder / "adapter_config.json"
    return load_file(file), json.loads(config.read_text()).get("rank_pattern") if config.exists() else None


def same(one: Path, other: Path) -> bool:
    (a, ranks), (b, other_ranks) = saved(one), saved(other)
    return ranks == other_ranks and set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def final(run: Path) -> Path:
    return next(folder for folder in (run / "adapter", run / "model") if folder.exists())


def best_weights_are_kept(bench: Bench, overrides: list[str], killed_after: int | None) -> dict[str, Any]:
    folder = bench.shared_folder()
    keys = ["optim.learning_rate=0.02", *BEST, *overrides]
    config = configured(bench, folder, "straight", *keys)
    straight = whole_run(bench, config)
    summary: Any = read_summary(straight)

    # Another engine takes exactly so many steps of the same schedule.
    loop = bench.loop(config)
    for step in range(summary["best_step"]):
        loop.step(step)
    save_final(loop.engine, folder / "reference", Tokenizer(), config, [])
    barrier()
    records = read_metrics(straight)
    seen = {
        "steps": summary["steps"],
        "best": summary["best_step"],
        "stopped": summary["stopped_early"],
        "losses": {r["step"]: r["eval_loss"] for r in records if "eval_loss" in r},
        "metrics": {k: v for k, v in summary["metrics"].items() if not k.endswith("_before")},
        "expected": {k: v for k, v in records[summary["best_step"]].items() if k.startswith("eval_")},
        "equals the reference": same(final(straight), final(folder / "reference")),
        "tensors": len(saved(final(straight))[0]),
        "ranks": saved(final(straight))[1],
        "kept": [int(f.name.removeprefix("step-")) for f in sorted((straight / "checkpoints").iterdir())],
    }
    if killed_after is not None:
        seen |= _cut(bench, folder, summary["best_step"] + killed_after, straight, keys)
    return seen


class Tokenizer:
    """None is needed beside the reference's weights."""

    def save_pretrained(self, _: str) -> None:
        pass


def _cut(bench: Bench, folder: Path, step: int, straight: Path, keys: list[str]) -> dict[str, Any]:
    """The same run, killed before that step and started again."""
    config = configured(bench, folder, "cut", *keys)
    killed = False
    try:
        with killed_at(step):
            whole_run(bench, config)
    except Killed:
        killed = True
    barrier()
    run = whole_run(bench, config)
    found: Any = read_summary(run)
    expected: Any = read_summary(straight)
    alike = all(found[key] == expected[key] for key in ("steps", "best_step", "stopped_early", "metrics"))
    return {"killed": killed, "same summary": alike, "same weights": same(final(run), final(straight))}


def a_best_that_cannot_be_saved(bench: Bench) -> dict[str, Any]:
    """The disk is full at the best evaluation: the best of those that were saved is put back."""
    folder = bench.shared_folder()
    keys = ["zero=stage2", *BEST, "optim.learning_rate=0.02", "checkpoint.every_steps=0", "batch.max_steps=26"]
    straight: Any = read_summary(whole_run(bench, configured(bench, folder, "straight", *keys)))
    best_step, write = straight["best_step"], Checkpointer._write_adapter

    def full_disk(self: Checkpointer, partial: Path, *rest: Any) -> str | None:
        if partial.name == f"step-{best_step:08d}.partial":
            return "No space left on device"
        return write(self, partial, *rest)

    with patch.object(Checkpointer, "_write_adapter", full_disk):
        run = whole_run(bench, configured(bench, folder, "full-disk", *keys))
    summary: Any = read_summary(run)
    losses = {r["step"]: r["eval_loss"] for r in read_metrics(run)[1:] if "eval_loss" in r}
    return {
        "lost": best_step,
        "best": summary["best_step"],
        "best of the others": min((s for s in losses if s != best_step), key=lambda s: losses[s]),
        "metric": summary["metrics"]["eval_loss"] == losses[summary["best_step"]],
        "logged": [line for line in (run / "log.txt").read_text().splitlines() if "could not be written" in line],
    }


def overfitting_is_logged_once(bench: Bench) -> dict[str, Any]:
    folder = bench.shared_folder()
    keys = ["zero=stage2", "optim.learning_rate=0.01", "schedule.name=constant", "eval.overfit_gap=0.3"]
    run = whole_run(bench, configured(bench, folder, "warned", *keys, "batch.max_steps=24"))
    stopped = whole_run(bench, configured(bench, folder, "stopped", *keys, "eval.stop_on_overfit=true"))
    gaps, losses = {}, []
    for record in read_metrics(run)[1:]:
        losses.append(record["loss"])
        if "eval_loss" in record:
            gaps[record["step"]] = record["eval_loss"] - sum(losses) / len(losses)
            losses = []
    summary: Any = read_summary(stopped)
    return {
        "warnings": [line for line in (run / "log.txt").read_text().splitlines() if "overfitting:" in line],
        "gaps": gaps,
        "stopped": {key: summary[key] for key in ("status", "steps", "stopped_early", "best_step")},
    }


CASES: dict[str, Callable[[Bench], Any]] = {
    **{
        f"best {case}": partial(best_weights_are_kept, overrides=overrides, killed_after=killed_after)
        for case, (overrides, killed_after) in BEST_CASES.items()
    },
    "best on a full disk": a_best_that_cannot_be_saved,
    "overfitting": overfitting_is_logged_once,
}


if __name__ == "__main__":
    Bench().record(CASES)
