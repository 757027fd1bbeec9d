"""Finish a run: save what it has trained, build its summary, log its result."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.checkpoint.run_folder import Run
from trainer.config import TrainConfig
from trainer.config.dataset_spec import is_template_file
from trainer.data.run_data import Data
from trainer.data.templates.template import Template
from trainer.engine.whole_state import StateOwner, gather_live
from trainer.errors import TRIAL, TrainingError
from trainer.models.end_tokens import save_tokenizer
from trainer.models.processor_files import copy_processor_files
from trainer.tracking.files import build_summary, read_metrics
from trainer.tracking.result import result_lines
from trainer.training.outcome import Outcome

logger = logging.getLogger(__name__)


def save_final(engine: StateOwner, run_dir: Path, tokenizer: Any, config: TrainConfig, end_ids: Sequence[int]) -> None:
    """Save the adapter (or the whole model) with its tokenizer and read it back. A collective.

    Args:
        engine: of the weights that are saved.
        run_dir: the run folder.
        tokenizer: of the base.
        config: the whole configuration.
        end_ids: token ids that end an answer.

    Raises:
        TrainingError: training has changed nothing.
    """
    runtime = engine.runtime
    weights = gather_live(engine, only_trainable=not runtime.trains_base_weights)
    if not engine.world.is_main:
        return
    target = run_dir / runtime.folder_name
    runtime.save(engine.model, target, weights)
    if runtime.is_untouched(weights):
        reason = "changes nothing: every trained tensor is what it started as"
        raise TrainingError(str(target), reason=reason, hint="raise optim.learning_rate")
    generation_config = getattr(engine.model, "generation_config", None)
    save_tokenizer(_with_template(tokenizer, config), target, end_ids, generation_config)
    if runtime.trains_base_weights:
        copy_processor_files(engine.model, target, config.model.revision)


def _with_template(tokenizer: Any, config: TrainConfig) -> Any:
    """Return the tokenizer as it is saved: a chat template from a file goes with it, for whoever serves the model."""
    data = config.data
    if is_template_file(data.template):
        tokenizer.chat_template = Template.from_config(tokenizer, data).chat_template
    return tokenizer


def copy_rejected_rows(data: Data, run_dir: Path) -> None:
    """Copy the rows that were left out into the run folder: the cache may be emptied."""
    parts = [part for part in data.parts if part.refused or part.dropped]
    if parts:
        with (run_dir / "refused.jsonl").open("wb") as out:
            for part in parts:
                with part.refused_file.open("rb") as rows:
                    shutil.copyfileobj(rows, out)


def summarize(
    outcome: Outcome,
    model_info: dict[str, Any],
    run: Run,
    seconds: float,
    data_fingerprint: str,
    stopped_by: str | None = None,
) -> dict[str, Any]:
    """Build the summary of a run that ended well; its metrics are those of the weights that it ends with."""
    before = {f"{name}_before": value for name, value in run.scores_before().items()}
    return build_summary(
        status=outcome.status,
        steps=outcome.steps,
        wall_seconds=seconds,
        trainable_parameters=model_info["trainable_parameters"],
        total_parameters=model_info["total_parameters"],
        train_loss=outcome.train_loss,
        metrics={**outcome.scores, **before},
        best_step=outcome.best_step,
        skipped_steps=outcome.skipped_steps,
        stopped_early=outcome.stopped_early,
        save_seconds=outcome.save_seconds,
        stopped_by=stopped_by,
        data_fingerprint=data_fingerprint,
    )


def name_stop(config: TrainConfig, outcome: Outcome, heard: str | None) -> str | None:
    """Return what has stopped a preempted run, as ``summary.json`` names it; ``None`` of another.

    Args:
        config: the whole configuration.
        outcome: of the run.
        heard: what this rank was asked to stop by.
    """
    if outcome.status != "preempted":
        return None
    return heard or ("run.stop_at_step" if _stops_as_planned(config, outcome) else "a signal to another rank")


def _stops_as_planned(config: TrainConfig, outcome: Outcome) -> bool:
    return config.run.stop_at_step is not None and outcome.steps >= config.run.stop_at_step


def log_result(config: TrainConfig, outcome: Outcome, run: Run, summary: dict[str, Any], total_steps: int) -> None:
    """Log how the run ended, which weights it leaves, and their scores beside those before training. On rank 0."""
    if outcome.status == "preempted":
        stop_at = config.run.stop_at_step
        is_planned = _stops_as_planned(config, outcome)
        goes_on = f"with run.stop_at_step above {stop_at}, or null, it goes on" if is_planned else ""
        logger.info(f"stopped on request after step {outcome.steps}; {goes_on or 'the same command resumes there'}")
        return
    if outcome.stopped_early:
        logger.info(f"stopped early, after step {outcome.steps} of {total_steps}: {outcome.stopped_early}")
    best = config.eval.best_metric
    if best is not None and best in outcome.scores:
        at = f"step {outcome.best_step} of {total_steps}"
        logger.info(f"best {best} {outcome.scores[best]:.4f} at {at}: its weights are kept")
    lines = result_lines(run.folder, config, summary, read_metrics(run.folder), with_next=TRIAL not in os.environ)
    for line in lines:
        logger.info(line)
