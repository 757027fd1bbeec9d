"""Run one training run from start to end on this rank."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

from trainer.checkpoint.run_folder import open_run
from trainer.config import TrainConfig
from trainer.distributed import process_group as distributed
from trainer.distributed.process_group import World
from trainer.errors import PREEMPTED_EXIT_CODE
from trainer.tracking.files import STOP_FILE, write_summary
from trainer.training.build import Built, build
from trainer.training.faults import watched
from trainer.training.finish import log_result, name_stop, save_final, summarize
from trainer.training.job import Job, describe_failure, open_loop, prepare
from trainer.training.loop import Loop
from trainer.training.out_of_memory import out_of_memory_explained
from trainer.training.outcome import Outcome
from trainer.training.start import log_start

logger = logging.getLogger(__name__)


def train(config: TrainConfig, world: World) -> int:
    """Run one training run on this rank. Returns the exit code; errors are recorded in the run's summary."""
    prepared = prepare(config, world)
    try:
        data = prepared.data
        with open_run(config, world, data.total_steps(config.batch), data.fingerprint) as run:
            if run.finished is not None:
                return 0
            job = prepared.of(config, run)
            job.stop.begin(*([run.folder / STOP_FILE] if world.is_main else []))
            record_failure = partial(_record_failure, job)
            with (
                watched(run.folder, world, config.fault.timeout_seconds, record_failure) as heartbeat,
                out_of_memory_explained(config, world),
            ):
                outcome = run_job(replace(job, stage=heartbeat.stage))
                distributed.barrier()  # rank 0 may still be writing: a node that leaves early would take it along
            return 0 if outcome.status == "finished" else PREEMPTED_EXIT_CODE
    finally:
        distributed.shutdown()


def run_job(job: Job) -> Outcome:
    """Build the model, resume, train, save what was trained, and write the summary. A collective."""
    config, world, run = job.config, job.world, job.run
    built = build(config, world, job.base_dir, job.data, job.tokenizer)
    loop, restored = open_loop(job, built, Loop)
    summary: dict[str, Any] = {}
    try:
        if world.is_main:
            log_start(config, job.data, built.model_info, run.folder, restored.step, loop.loader.source)
        with closing(loop.loader):
            outcome = loop.train(restored.step, restored.record)
        job.stage("end")
        summary = finish_run(job, built, outcome, loop.schedule.total_steps)
        return outcome
    except Exception as error:
        summary = describe_failure(job, error)
        raise
    finally:
        loop.tracker.close(summary)


def finish_run(
    job: Job,
    built: Built,
    outcome: Outcome,
    total_steps: int,
    *,
    stopped_by: str | None = None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Save what was trained, write the summary, log the result.

    Args:
        job: the run.
        built: what it trained.
        outcome: how it ended.
        total_steps: that were planned.
        stopped_by: what has stopped it, where that was no request to this process.
        more: what else the summary holds.
    """
    if outcome.status == "finished":
        save_final(built.engine, job.run.folder, job.tokenizer, job.config, job.data.end_ids)
        if (found := built.engine.runtime.describe()) is not None:
            logger.info(found)
    stopped_by = stopped_by or name_stop(job.config, outcome, job.stop.name)
    summary = summarize(outcome, built.model_info, job.run, job.seconds, job.data.fingerprint, stopped_by)
    summary |= more or {}
    if job.world.is_main:
        write_summary(job.run.folder, summary)
        log_result(job.config, outcome, job.run, summary, total_steps)
    return summary


def _record_failure(job: Job, error: Exception) -> None:
    """Write the summary of a failed run, on whichever rank fails: rank 0 may never hear of it."""
    write_summary(job.run.folder, describe_failure(job, error))
