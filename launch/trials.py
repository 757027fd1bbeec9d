"""Run trials: runs that belong together, each in a process of its own, started or found finished.

Commands with the same trials share them: what one of them trains the others leave, go on with the next, and wait for.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import trainer.config
from launch import process, torchrun
from launch.environment import child_environment, visible_gpus
from trainer.config import TrainConfig
from trainer.errors import AfinaError, LaunchError
from trainer.files import find_owner, try_lock
from trainer.tracking.files import find_summary

POLL_SECONDS = 2.0

Job = Generator[str, None, int]
"""Runs trials and returns an exit code; yields, as often as it is asked, which trial it waits for and who trains it."""

logger = logging.getLogger(__name__)


class TrialOwned(Exception):
    """Another living process trains the trial, or is about to; the message names it."""


@dataclass(frozen=True)
class Trial:
    """Hold one run of several: it can be started by itself with `afina train` and these overrides."""

    name: str
    overrides: list[str]
    values: dict[str, str]
    config: TrainConfig

    @property
    def folder(self) -> Path:
        """Return the trial's run folder."""
        return trainer.config.run_folder(self.config)


def run_trial(trial: Trial, config_file: Path | None = None) -> tuple[int, str]:
    """Run a trial to its end; return its exit code and, when it failed, why."""
    try:
        if trial.config.launch.kind == "torchrun":
            code = torchrun.launch(trial.config, trial.overrides, config_file)
        else:
            arguments = torchrun.train_arguments(trial.config, trial.overrides, config_file)
            environment = child_environment(1, visible_gpus())
            code = process.run([sys.executable, "-m", "trainer.train", *arguments], environment, trial.folder)
    except AfinaError as error:
        return error.exit_code, str(error)
    if code == 0:
        return 0, ""
    reason = (find_summary(trial.folder).get("error") or {}).get("message")
    return code, reason or f"exit code {code}, see {trial.folder / 'log.txt'}"


def take_turns(jobs: Sequence[Job]) -> int:
    """Run jobs in their order; one that waits for another process lets the next ones go first.

    Returns:
        0, or the exit code of the job that was stopped, after which no other is begun.
    """
    left, told = list(jobs), 0
    while True:
        waiting: dict[Job, str] = {}
        for job in left:
            try:
                waiting[job] = next(job)
            except StopIteration as end:
                if end.value in process.STOPPED:
                    return end.value
        if not waiting:
            return 0
        if len(waiting) != told:
            logger.info(f"waiting for {', '.join(waiting.values())}")
        if stopped := process.pause(POLL_SECONDS):
            logger.info("stopped; the same command goes on")
            return stopped
        left, told = list(waiting), len(waiting)


def run_shared(trial: Trial, label: str, config_file: Path | None = None) -> Generator[str, None, tuple[int, str]]:
    """Run a trial unless it is finished or until another process has finished it; return as :func:`run_trial` does.

    Yields:
        Which trial it is and who trains it, as long as that is another process.
    """
    is_left = False
    while True:
        try:
            return run_if_needed(trial, label, config_file)
        except TrialOwned as owner:
            if not is_left:
                logger.info(f"{label}: left to {owner}")
            is_left = True
            yield f"{label} ({owner})"


def run_if_needed(trial: Trial, label: str, config_file: Path | None = None) -> tuple[int, str]:
    """Run a trial unless it is finished, and log which; return as :func:`run_trial` does.

    Raises:
        TrialOwned: another process trains it.
    """
    with _claimed(trial) as owner:
        if is_finished(trial):
            logger.info(f"{label}: finished before")
            return 0, ""
        if owner is not None:
            raise TrialOwned(owner)
        logger.info(f"{label}: starting")
        before = process.summary_identity(trial.folder)
        code, error = run_trial(trial, config_file)
        is_refused = code == LaunchError.exit_code and process.summary_identity(trial.folder) == before
        if is_refused and not _on_several_nodes(trial) and (owner := find_owner(trial.folder)) is not None:
            raise TrialOwned(owner)  # one that does not claim, `afina train` or another host's, was quicker
    if code in process.STOPPED:
        logger.info(f"{label}: stopped; the same command resumes it")
    elif code:
        logger.info(f"{label}: failed: {error}")
    return code, error


@contextmanager
def _claimed(trial: Trial) -> Iterator[str | None]:
    """Claim a trial inside the ``with`` block, from before its process has started; yield whose it is where it is
    another's."""
    if _on_several_nodes(trial):
        yield None
        return
    folder = trial.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with try_lock(folder.with_name(f".{folder.name}.claim.lock")) as is_free:
        yield find_owner(folder) or (None if is_free else "another process, which is starting it")


def _on_several_nodes(trial: Trial) -> bool:
    """Return whether the same command runs on every node: then they train the trial together."""
    return trial.config.launch.kind == "torchrun" and trial.config.launch.nodes > 1


def is_finished(trial: Trial) -> bool:
    """Return whether it is finished, and with what changes the result as here: a name may have been given twice."""
    if trial.config.run.overwrite or find_summary(trial.folder).get("status") != "finished":
        return False
    try:
        finished_config = trainer.config.load([], trial.folder / "config.yaml")
    except AfinaError:
        return False  # the training process will report it
    return not trainer.config.changed_result_fields(finished_config, trial.config)


def default_run_name(config: TrainConfig) -> str:
    """Return the name a config would have if none were given: it holds a digest of all that changes the result."""
    return trainer.config.run_name(replace(config, run=replace(config.run, name=None)))


def digest_name(parts: Sequence[str], prefix: str) -> str:
    """Return ``prefix`` and eight hex digits that identify ``parts``, in whatever order."""
    return prefix + hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()[:8]
