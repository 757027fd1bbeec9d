"""Hold what a run starts from, and make the parts of its loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.run_folder import Run
from trainer.config import TrainConfig
from trainer.config.identity import run_identity
from trainer.data.batching.packing import Packing
from trainer.data.run_data import Data
from trainer.data.step_batches import StepLoader, StepSource
from trainer.distributed.process_group import World
from trainer.evaluation.generator import Generator
from trainer.tracking.tracker import Tracker
from trainer.training.build import Built
from trainer.training.loop import Loop
from trainer.training.monitor import EvalMonitor
from trainer.training.save_timer import SaveTimer
from trainer.training.schedule import Schedule
from trainer.training.skipped_steps import SkippedSteps
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
