"""The end of a run: what it has trained, its summary, and what people are told of both."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from trainer.checkpoint.run_folder import Run
from trainer.config import TrainConfig
from trainer.config.dataset_spec import is_template_file
from trainer.config.schema import METRICS
from trainer.data.load import Data
from trainer.data.templates.template import Template
from trainer.engine.engine import Engine
from trainer.engine.whole_state import gather_live
from trainer.errors import TrainingError
from trainer.methods import digests, save_adapter, save_full
from trainer.tracking.tracker import Tracker
from trainer.training.loop import Outcome


def save_final(engine: Engine, folder: Path, tokenizer: Any, config: TrainConfig, started: dict[str, str]) -> None:
    """The adapter (or the whole model) with its tokenizer, reopened and compared. A collective.

    Args:
        engine: whose weights are saved.
        folder: the run folder.
        tokenizer: of the base.
        config: the whole configuration.
        started: digests of what the adapter started as; read on rank 0 only.

    Raises:
        TrainingError: the adapter is what it started as.
    """
    is_full = config.method.name == "full"
    weights = gather_live(engine, only_trained=not is_full)
    if not engine.world.is_main:
        return
    target = folder / ("model" if is_full else "adapter")
    if is_full:
        save_full(engine.model, target, weights)
    else:
        save_adapter(engine.model, target, weights, engine.start)
        if digests(weights) == started:
            reason = "changes nothing: every trained tensor is what it started as"
            raise TrainingError(str(target), reason=reason, hint="raise optim.learning_rate")
    _with_template(tokenizer, config).save_pretrained(str(target))


def _with_template(tokenizer: Any, config: TrainConfig) -> Any:
    """The tokenizer as it is saved: a chat template from a file goes with it, for whoever serves the model."""
    keys = config.data
    if is_template_file(keys.template):
        tokenizer.chat_template = Template(tokenizer, keys.template, keys.alpaca_role, keys.train_on).chat_template
    return tokenizer


def copy_refused(data: Data, folder: Path) -> None:
    """Keep the rows that were left out with the run: the cache may be emptied."""
    parts = [part for part in data.parts if part.refused or part.dropped]
    if parts:
        with (folder / "refused.jsonl").open("wb") as out:
            for part in parts:
                with part.refused_file.open("rb") as rows:
                    shutil.copyfileobj(rows, out)


def build_summary(outcome: Outcome, facts: dict[str, Any], run: Run, seconds: float) -> dict[str, Any]:
    """What goes into summary.json. ``metrics`` are those of the weights that the run ends with."""
    before = run.scores_before()
    return {
        "status": outcome.status,
        "steps": outcome.steps,
        "wall_seconds": seconds,
        "trainable_parameters": facts["trainable_parameters"],
        "total_parameters": facts["total_parameters"],
        "train_loss": outcome.train_loss,
        "metrics": {**outcome.scores, **{f"{k}_before": v for k, v in before.items()}},
        "best_step": outcome.best_step,
        "stopped_early": outcome.stopped_early,
        "error": None,
    }


def log_result(
    tracker: Tracker, config: TrainConfig, outcome: Outcome, run: Run, summary: dict[str, Any], total_steps: int
) -> None:
    """The last lines: how the run ended, which weights it leaves, and their scores beside those before training."""
    if outcome.status == "preempted":
        tracker.say(f"stopped on request after step {outcome.steps}; the same command goes on from there")
        return
    if outcome.stopped_early:
        tracker.say(f"stopped early, after step {outcome.steps} of {total_steps}: {outcome.stopped_early}")
    metrics, best = summary["metrics"], config.eval.best_metric
    if best is not None and best in outcome.scores:
        at = f"step {outcome.best_step} of {total_steps}"
        tracker.say(f"best {best} {outcome.scores[best]:.4f} at {at}: its weights are kept")
    for name in ("eval_loss", *METRICS):
        if name in metrics:
            before = f"{metrics[f'{name}_before']:.4f} → " if f"{name}_before" in metrics else ""
            tracker.say(f"{name}: {before}{metrics[name]:.4f}")
    tracker.say(f"finished {outcome.steps} steps in {summary['wall_seconds']:.0f} s: {run.folder}")
