"""Hold what a run starts from, and make the parts of its loop."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from trainer.checkpoint.checkpointer import Checkpointer, Restored
from trainer.checkpoint.commit import archive_after
from trainer.checkpoint.config_history import write_config
from trainer.checkpoint.run_folder import Run
from trainer.config import TrainConfig
from trainer.config.identity import run_identity
from trainer.data.batching.packing import Packing
from trainer.data.load import load_data
from trainer.data.run_data import Data
from trainer.data.step_batches import StepLoader, StepSource
from trainer.distributed import process_group as distributed
from trainer.distributed.process_group import World
from trainer.engine.device import device_name
from trainer.evaluation.generator import Generator
from trainer.kernels.deterministic import use_deterministic_kernels
from trainer.models.embedded import resolve
from trainer.models.loading import load_tokenizer
from trainer.tracking.environment import write_environment
from trainer.tracking.files import build_summary, describe_error
from trainer.tracking.tracker import Tracker
from trainer.training.build import Built
from trainer.training.finish import copy_rejected_rows
from trainer.training.loop import Loop
from trainer.training.monitor import EvalMonitor
from trainer.training.out_of_memory import explain_out_of_memory
from trainer.training.save_timer import SaveTimer
from trainer.training.schedule import Schedule
from trainer.training.skipped_steps import SkippedSteps
from trainer.training.start import values_taken
from trainer.training.stop_request import StopRequest

logger = logging.getLogger(__name__)

L = TypeVar("L", bound=Loop)


def _told_nobody(*_: Any) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a run starts from, before its model is loaded.

    Attributes:
        config: the whole configuration.
        world: this process.
        base_dir: the base model's local folder or hub id.
        tokenizer: of the base.
        data: the prepared rows.
        run: the run folder, and where it resumes from.
        stop: set when the process is asked to stop.
        begin: ``time.perf_counter()`` at the start of the process's work, less what earlier lives of the run took.
        stage: told what this rank does (``Heartbeat.stage``).
    """

    config: TrainConfig
    world: World
    base_dir: str
    tokenizer: Any
    data: Data
    run: Run
    stop: StopRequest
    begin: float
    stage: Callable[..., None] = _told_nobody

    @property
    def seconds(self) -> float:
        """Wall time so far, of all lives."""
        return time.perf_counter() - self.begin

    def of(self, config: TrainConfig, run: Run) -> Job:
        """Return the job of a run that starts from the same."""
        return replace(self, config=config, run=run, begin=self.begin - run.elapsed_before())


def prepare(config: TrainConfig, world: World) -> Job:
    """Load what a run starts from, and meet the other ranks; its folder is not open yet. The process group is up then.

    Raises:
        AfinaError: the base, its tokenizer or the data cannot be used, or a rank does not come.
    """
    begin = time.perf_counter()
    stop = StopRequest().install()
    if config.run.deterministic:
        use_deterministic_kernels()
    base_dir = resolve(config.model.name_or_path, config.model.revision)
    tokenizer = load_tokenizer(base_dir, config.model)
    data = load_data(config, tokenizer)
    distributed.init(world, config.launch.rendezvous_seconds)
    return Job(
        config=config,
        world=world,
        base_dir=base_dir,
        tokenizer=tokenizer,
        data=data,
        run=Run(Path()),
        stop=stop,
        begin=begin,
    )


def open_loop(job: Job, built: Built, kind: type[L], *, alone: bool = True) -> tuple[L, Restored]:
    """Restore a run, open its records, and put its loop together. A collective.

    Args:
        job: the run.
        built: what it trains.
        kind: of loop.
        alone: it is the only run of this process: it has the terminal, and deletes its older checkpoints itself.
    """
    checkpointer = create_checkpointer(job, built, prunes=alone)
    restored = checkpointer.restore(job.run.resume_from)
    if restored.decays_all and job.config.optim.decay_biases_and_norms is None and alone:  # trials train matrices
        built.engine.decay_all()
    schedule = create_schedule(job)
    taken = values_taken(job.config, built.model_info, schedule.total_steps, built.engine.decays_all)
    _write_run_files(job, restored.step, taken)
    tracker = Tracker.open(
        job.config,
        job.run.folder,
        is_main=job.world.is_main,
        total_steps=schedule.total_steps,
        resume_step=restored.step,
        model_info=built.model_info,
        alone=alone,
    )
    try:
        monitor = open_monitor(job.config, restored.monitor_state, checkpointer)
        loop = create_loop(
            job, built, checkpointer=checkpointer, tracker=tracker, monitor=monitor, schedule=schedule, kind=kind
        )
    except Exception as error:
        tracker.close(describe_failure(job, error))
        raise
    return loop, restored


def create_checkpointer(job: Job, built: Built, prunes: bool = True) -> Checkpointer:
    """Create what saves this run's checkpoints in its folder, and restores from them."""
    return Checkpointer(
        engine=built.engine,
        run_dir=job.run.folder,
        run_identity=run_identity(job.config, job.data.fingerprint),
        config=job.config.checkpoint,
        prunes=prunes,
    )


def open_monitor(config: TrainConfig, state: dict[str, Any] | None, checkpointer: Checkpointer) -> EvalMonitor:
    """Resume the monitor of evaluations from a checkpoint's state (``None``: fresh). A collective.

    A run that resumes from an older checkpoint may have lost what was the best then: it is given up.
    """
    monitor = EvalMonitor(config.eval, state)
    if monitor.best_step is not None:
        _, corruption = checkpointer.inspect(monitor.best_step)
        if corruption is not None:
            logger.warning(f"the best evaluation so far, of step {monitor.best_step}, is given up: {corruption}")
            monitor.lose_best()
    return monitor


def create_schedule(job: Job) -> Schedule:
    """Create what says which learning rate a step has, and what is due after it."""
    data = job.data
    steps = data.total_steps(job.config.batch)
    return Schedule(job.config, steps, len(data.train), has_validation=len(data.validation) > 0)


def create_loop(
    job: Job,
    built: Built,
    *,
    checkpointer: Checkpointer,
    tracker: Tracker,
    monitor: EvalMonitor,
    schedule: Schedule,
    kind: type[L],
) -> L:
    """Put a run's loop together from its parts; ``kind``: of loop."""
    return kind(
        config=job.config,
        world=job.world,
        data=job.data,
        packing=built.packing,
        loader=create_loader(job, built.packing, schedule.total_steps),
        engine=built.engine,
        generator=create_generator(job, built),
        tracker=tracker,
        meter=built.meter,
        stop=job.stop,
        checkpointer=checkpointer,
        monitor=monitor,
        schedule=schedule,
        save_timer=SaveTimer(job.config.checkpoint.every_minutes),
        skipped=SkippedSteps.read(job.run.folder, job.world),
        stage=job.stage,
        begin=job.begin,
    )


def create_loader(job: Job, packing: Packing, total_steps: int) -> StepLoader:
    """Create what makes the batches of each step."""
    source = StepSource(
        rows=job.data.train,
        packing=packing,
        seed=job.config.run.seed,
        global_size=job.config.batch.global_size,
        rank=job.world.rank,
        world_size=job.world.world_size,
        device=job.world.device,
    )
    return StepLoader(source, total_steps)


def create_generator(job: Job, built: Built) -> Generator:
    """Create what answers prompts with the model in training; under ZeRO-3 all ranks generate in lockstep."""
    config = job.config
    return Generator(
        built.engine.model,
        job.tokenizer,
        config.generate,
        job.data.end_ids,
        job.world.device,
        lockstep=config.zero.stage == 3,
        opening_ids=job.data.opening_ids,
    )


def _write_run_files(job: Job, first_step: int, taken: dict[str, Any]) -> None:
    """Write what the run folder holds from the start, and archive checkpoints that the run has gone back behind."""
    world, folder = job.world, job.run.folder
    devices = distributed.gather_objects(device_name(world.device))
    hosts = distributed.gather_objects(socket.gethostname())
    if world.is_main:
        archive_after(folder, first_step)
        write_config(folder, job.config, first_step, taken)
        copy_rejected_rows(job.data, folder)
        write_environment(folder, {"world_size": world.world_size, "devices": devices, "hosts": hosts})


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
