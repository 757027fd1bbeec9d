"""Run one training run from start to end on this rank."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

from trainer.checkpoint.commit import archive_after
from trainer.checkpoint.config_history import write_config
from trainer.checkpoint.run_folder import open_run
from trainer.config import TrainConfig
from trainer.data.load import load_data
from trainer.distributed import process_group as distributed
from trainer.distributed.process_group import World
from trainer.engine.device import device_name
from trainer.errors import PREEMPTED_EXIT_CODE
from trainer.kernels.deterministic import use_deterministic_kernels
from trainer.models.embedded import resolve
from trainer.models.loading import load_tokenizer
from trainer.tracking.environment import write_environment
from trainer.tracking.files import STOP_FILE, build_summary, describe_error, write_summary
from trainer.tracking.tracker import Tracker
from trainer.training.build import Built, build
from trainer.training.faults import watched
from trainer.training.finish import copy_rejected_rows, log_result, name_stop, save_final, summarize
from trainer.training.job import (
    Job,
    create_checkpointer,
    create_loop,
    create_schedule,
    open_monitor,
)
from trainer.training.loop import Loop
from trainer.training.out_of_memory import explain_out_of_memory, out_of_memory_explained
from trainer.training.outcome import Outcome
from trainer.training.start import log_start, values_taken
from trainer.training.stop_request import StopRequest

logger = logging.getLogger(__name__)


def train(config: TrainConfig, world: World) -> int:
    """Run one training run on this rank. Returns the exit code; errors are recorded in the run's summary."""
    begin = time.perf_counter()
    stop = StopRequest().install()
    if config.run.deterministic:
        use_deterministic_kernels()
    base_dir = resolve(config.model.name_or_path, config.model.revision)
    tokenizer = load_tokenizer(base_dir, config.model)
    data = load_data(config, tokenizer)
    distributed.init(world, config.launch.rendezvous_seconds)
    try:
        with open_run(config, world, data.total_steps(config.batch), data.fingerprint) as run:
            if run.finished is not None:
                return 0
            job = Job(
                config=config,
                world=world,
                base_dir=base_dir,
                tokenizer=tokenizer,
                data=data,
                run=run,
                stop=stop,
                begin=begin - run.elapsed_before(),
            )
            stop.begin(*([run.folder / STOP_FILE] if world.is_main else []))
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
    checkpointer = create_checkpointer(job, built)
    restored = checkpointer.restore(run.resume_from)
    schedule = create_schedule(job)
    write_run_files(job, restored.step, values_taken(config, built.model_info, schedule.total_steps))
    tracker = Tracker.open(
        config,
        run.folder,
        is_main=world.is_main,
        total_steps=schedule.total_steps,
        resume_step=restored.step,
        model_info=built.model_info,
    )
    summary: dict[str, Any] = {}
    try:
        monitor = open_monitor(config, restored.monitor_state, checkpointer)
        loop = create_loop(
            job, built, checkpointer=checkpointer, tracker=tracker, monitor=monitor, schedule=schedule, kind=Loop
        )
        if world.is_main:
            log_start(config, job.data, built.model_info, run.folder, restored.step, loop.loader.source)
        with closing(loop.loader):
            outcome = loop.train(restored.step, restored.record)
        job.stage("end")
        summary = finish_run(job, built, outcome, schedule.total_steps)
        return outcome
    except Exception as error:
        summary = describe_failure(job, error)
        raise
    finally:
        tracker.close(summary)


def write_run_files(job: Job, first_step: int, taken: dict[str, Any]) -> None:
    """Write what the run folder holds from the start, and archive checkpoints that the run has gone back behind."""
    world, folder = job.world, job.run.folder
    devices = distributed.gather_objects(device_name(world.device))
    hosts = distributed.gather_objects(socket.gethostname())
    if world.is_main:
        archive_after(folder, first_step)
        write_config(folder, job.config, first_step, taken)
        copy_rejected_rows(job.data, folder)
        write_environment(folder, {"world_size": world.world_size, "devices": devices, "hosts": hosts})


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


def describe_failure(job: Job, error: Exception) -> dict[str, Any]:
    """Build the summary of a run that failed."""
    shown = explain_out_of_memory(error, job.config, job.world) or error
    return build_summary(
        status="failed",
        steps=job.run.last_logged_step(),
        wall_seconds=job.seconds,
        data_fingerprint=job.data.fingerprint,
        error=describe_error(shown, job.world.rank),
    )
