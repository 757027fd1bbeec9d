"""Run a group of trials from start to end on this rank."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from trainer.checkpoint.commit import checkpoint_dir
from trainer.checkpoint.run_folder import Run, open_run
from trainer.config.method import given
from trainer.data.describe import describe
from trainer.distributed import process_group as distributed
from trainer.distributed.process_group import World, from_main
from trainer.errors import PREEMPTED_EXIT_CODE
from trainer.together.batches import GroupBatches
from trainer.together.build import BuiltTogether, build_together
from trainer.together.group import Group
from trainer.together.loop import GroupLoop
from trainer.together.rungs import Rungs
from trainer.together.saves import Saves, common_resume_point, read_saves
from trainer.together.step import GroupStep
from trainer.together.trial import Trial, TrialLoop
from trainer.tracking.files import STOP_FILE, write_summary
from trainer.tracking.result import size_text
from trainer.tracking.terminal import Terminal
from trainer.training.faults import watched
from trainer.training.job import Job, create_generator, create_loader, describe_failure, open_loop, prepare
from trainer.training.out_of_memory import out_of_memory_explained
from trainer.training.outcome import Outcome, Progress
from trainer.training.start import start_lines

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Left:
    """What has not ended: the jobs, and once they are trained, the trials."""

    jobs: list[Job]
    trials: list[Trial] | None = None


def train_together(group: Group, world: World) -> int:
    """Train the trials of a group on this rank. Returns the exit code: 0 where each has come to its end, by failing
    too; errors are recorded in the trials' summaries."""
    first = group.configs[0]
    prepared = prepare(first, world)
    try:
        data = prepared.data
        with ExitStack() as held:
            runs = [
                held.enter_context(open_run(config, world, data.total_steps(config.batch), data.fingerprint))
                for config in group.configs
            ]
            jobs = [prepared.of(config, run) for config, run in zip(group.configs, runs, strict=True)]
            if all(run.finished is not None for run in runs):
                return 0
            prepared.stop.begin(*(run.folder / STOP_FILE for run in runs if world.is_main))
            left = Left([job for job in jobs if job.run.finished is None])
            record_failure = partial(_record_failure, left)
            with (
                watched(group.folder, world, first.fault.timeout_seconds, record_failure) as heartbeat,
                out_of_memory_explained(first, world),
            ):
                has_ended = run_group(group, [replace(job, stage=heartbeat.stage) for job in jobs], left)
                distributed.barrier()  # rank 0 may still be writing: a node that leaves early would take it along
            return 0 if has_ended else PREEMPTED_EXIT_CODE
    finally:
        distributed.shutdown()


def run_group(group: Group, jobs: list[Job], left: Left) -> bool:
    """Build the model, resume, train; return whether all trials have come to their end. A collective.

    Args:
        group: what is trained.
        jobs: its trials, in their order; those that are finished, too.
        left: told what has not ended yet.
    """
    world, data = jobs[0].world, jobs[0].data
    saves = from_main(read_saves(group.folder) if world.is_main else Saves())
    folders = [job.run.folder for job in jobs]
    running = [_resumed(job, saves) for job in jobs if job.run.finished is None]
    rungs = None
    if group.halving is not None:
        rungs = Rungs(group.halving, folders, world)
        behind = rungs.replay(saves.steps, [job.run.folder for job in running])
        running = [job for job in running if job.run.folder not in behind]
        left.jobs = running
    if not running:
        return True
    named = [(f"trial_{number}", job) for number, job in enumerate(running)]
    named.sort(key=lambda item: given(item[1].config.method.r))  # neighbours of one rank share products
    running, configs = [job for _, job in named], {name: job.config for name, job in named}
    built = build_together(configs, world, jobs[0].base_dir, data, jobs[0].tokenizer)
    total_steps = max(data.total_steps(job.config.batch) for job in running)
    source = create_loader(running[0], built.packing, total_steps).source
    batches = GroupBatches.of(source, total_steps)
    together = {"group": group.name, "trials": len(running)}
    terminal: Terminal | None = None
    trials: list[Trial] = []
    summaries: dict[Trial, dict[str, Any]] = {}
    try:
        for name, job in zip(built.trials, running, strict=True):
            trials.append(_open_trial(job, name, built, together))
        left.trials = trials
        if world.is_main:
            first_step = min(trial.steps for trial in trials)
            terminal = Terminal(group.folder, total_steps=total_steps, resume_step=first_step)
            _log_start(trials, batches)
        loop = GroupLoop(
            folder=group.folder,
            trials=trials,
            step=_create_step(running[0], built, batches),
            generator=create_generator(running[0], next(iter(built.trials.values()))),
            scored=_scores_before(running, saves),
            rungs=rungs,
            terminal=terminal,
        )
        with closing(batches):
            return loop.train()
    except Exception as error:
        summaries = {trial: trial.describe_failure(error) for trial in trials}
        raise
    finally:
        for trial in trials:
            trial.loop.tracker.close(summaries.get(trial, {}))
        if terminal is not None:
            terminal.close()


def _resumed(job: Job, saves: Saves) -> Job:
    """Let a trial resume from the moment at which all had saved. A collective."""
    run = job.run
    found = common_resume_point(run.folder, run.resume_from, saves) if job.world.is_main else None
    return replace(job, run=Run(run.folder, resume_from=from_main(found)))


def _create_step(job: Job, built: BuiltTogether, batches: GroupBatches) -> GroupStep:
    """Create what makes the updates of a group; ``job``: of any of its trials."""
    return GroupStep(
        engine=built.engine,
        batches=batches,
        data=job.data,
        world=job.world,
        meter=built.meter,
        stop=job.stop,
        stage=job.stage,
    )


def _scores_before(jobs: list[Job], saves: Saves) -> dict[str, Mapping[str, float]]:
    """Return the scores that trials had at the common moment which they resume from, by the names of run folders."""
    found = {}
    for job in jobs:
        folder, name = job.run.folder, job.run.folder.name
        if name in saves.scores and job.run.resume_from == checkpoint_dir(folder, saves.steps[name]):
            found[name] = saves.scores[name]
    return found


def _open_trial(job: Job, adapter: str, built: BuiltTogether, together: dict[str, Any]) -> Trial:
    """Restore a trial and open its records. A collective."""
    own = built.trials[adapter]
    loop, restored = open_loop(job, own, TrialLoop, alone=False)
    return Trial(
        adapter=adapter,
        job=job,
        built=own,
        loop=loop,
        progress=Progress(Outcome("finished", restored.step), restored.step),
        record=restored.record,
        together=together,
    )


def _log_start(trials: list[Trial], batches: GroupBatches) -> None:
    """Log what the group is going to do, each trial into its own log in full. On rank 0."""
    first = trials[0]
    for trial in trials:
        with trial.own_lines():
            for line in start_lines(trial.job.config, trial.job.data, trial.built.model_info):
                logger.info(line)
            logger.info(f"run: {trial.job.run.folder}, trained together with {len(trials) - 1} others")
    info = first.built.model_info
    trained = sum(trial.built.model_info["trainable_parameters"] for trial in trials)
    config, size = first.job.config, batches.at_once(len(trials))
    useful, computed = batches.source.count_tokens(0)
    for line in describe(first.job.data, config):
        logger.info(line)
    logger.info(
        f"together: {len(trials)} trials on {config.model.name_or_path} in {info['dtype']} on {info['world_size']} × "
        f"{info['device']}, ZeRO stage {config.zero.stage}; {trained:,} trained parameters, {size} trials a forward"
    )
    state = size_text(info["state_bytes"])
    logger.info(f"memory: {state} a device for weights, gradients and optimizer of all; activations come on top")
    logger.info(f"{info['packing']}; a step: {useful:,} tokens of rows, {computed:,} computed a trial, at first")


def _record_failure(left: Left, error: Exception) -> None:
    """Write the summaries of what a failed group has not ended."""
    if left.trials is None:
        summaries = {job.run.folder: describe_failure(job, error) for job in left.jobs}
    else:
        summaries = {trial.job.run.folder: trial.describe_failure(error) for trial in left.trials}
    for folder, summary in summaries.items():
        write_summary(folder, summary)
