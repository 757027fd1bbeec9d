"""Run trials: runs that belong together, each in a process of its own, started or found finished.

Commands with the same trials share them: what one of them trains the others leave, go on with the next, and wait for.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import trainer.config
from launch import process, torchrun
from launch.crew import Crew
from launch.environment import without_names_of_one_run
from launch.stop_signals import StopSignals, stop_signals
from trainer.config import TrainConfig
from trainer.errors import TRIAL, AfinaError, LaunchError
from trainer.files import find_owner, try_lock
from trainer.tracking.files import CONFIG_FILE, find_summary

POLL_SECONDS = 2.0
STOP_KEY = "run.stop_at_step"

Job = Generator[str, None, int]
"""Runs trials and returns an exit code; yields, as often as it is asked, which trial it waits for and who trains it."""

logger = logging.getLogger(__name__)


class TrialOwned(Exception):
    """Another living process trains the trial, or is about to; the message names it."""


@dataclass(frozen=True)
class Trial:
    """Hold one run of several: it can be started by itself with `afina train` and these overrides.

    Attributes:
        name: of its run folder.
        overrides: what is typed.
        values: of the keys that differ between the trials.
        config: what is composed of the overrides.
        stop_at_step: updates after which it is stopped for now; ``None``: it is trained to its end.
    """

    name: str
    overrides: list[str]
    values: dict[str, str]
    config: TrainConfig
    stop_at_step: int | None = None

    @property
    def folder(self) -> Path:
        """Return the trial's run folder."""
        return trainer.config.run_folder(self.config)

    def until(self, step: int | None) -> Trial:
        """Return the trial as it is trained until a step, by ``run.stop_at_step``; ``None``: to its end."""
        if step is None:
            return self
        config = replace(self.config, run=replace(self.config.run, stop_at_step=step))
        return replace(self, overrides=[*self.overrides, f"{STOP_KEY}={step}"], config=config, stop_at_step=step)


def run_trial(trial: Trial, config_file: Path | None = None, crew: Crew | None = None) -> tuple[int, str]:
    """Run a trial to its end; return its exit code and, when it failed, why.

    Args:
        trial: what to train.
        config_file: a config.yaml to start from instead of `conf/`.
        crew: what it runs on; ``None``: a process of its own on all devices.
    """
    before = process.summary_identity(trial.folder)
    output = None
    try:
        if trial.config.launch.kind == "torchrun":
            with without_names_of_one_run():
                code = torchrun.launch(trial.config, trial.overrides, config_file, {TRIAL: "1"})
        else:
            arguments = torchrun.train_arguments(trial.config, trial.overrides, config_file)
            code, output = (crew or Crew(forks=False)).run(arguments, trial.folder)
    except AfinaError as error:
        return error.exit_code, str(error)
    if code == 0 or (code == process.PREEMPTED and has_reached(trial)):
        return 0, ""
    is_new = process.summary_identity(trial.folder) != before
    reason = (find_summary(trial.folder).get("error") or {}).get("message") if is_new else None
    return code, reason or without_reason(code, output)


def without_reason(code: int, output: Path | None) -> str:
    """Say where to look for why a process has ended that wrote no summary: what it said is on the screen, or kept."""
    if output is None:
        return f"exit code {code}, its own words are above"
    said = output.read_text(errors="replace").splitlines() if output.is_file() else []
    errors = [line for line in said if line.startswith("error: ")]
    return errors[-1].removeprefix("error: ") if errors else f"exit code {code}, see {output}"


def has_reached(trial: Trial) -> bool:
    """Return whether the trial was stopped at its ``stop_at_step``, or later."""
    summary = find_summary(trial.folder)
    return (
        trial.stop_at_step is not None
        and summary.get("status") == "preempted"
        and int(summary.get("steps") or 0) >= trial.stop_at_step
    )


def take_turns(jobs: Sequence[Job], at_once: int = 1) -> int:
    """Run jobs in their order, some at once; one that waits for another process lets the next ones go first.

    Returns:
        0, or the exit code of the job that was stopped, after which no other is begun.
    """
    left, told = list(jobs), 0
    with stop_signals() as signals, Turns(at_once, signals) as turns:
        while True:
            answers = turns.of(left)
            if stopped := next((code for code in answers.values() if code in process.STOPPED), 0):
                assert isinstance(stopped, int)
                return stopped
            waiting = {job: answer for job, answer in answers.items() if isinstance(answer, str)}
            if not waiting:
                return 0
            if len(waiting) != told:
                logger.info(f"waiting for {', '.join(waiting.values())}")
            if stopped := process.pause(POLL_SECONDS):
                logger.info("stopped; the same command goes on")
                return stopped
            left, told = list(waiting), len(waiting)


class Turns:
    """Lets jobs take a turn each: in this thread, or several at once in threads of their own."""

    def __init__(self, at_once: int, signals: StopSignals) -> None:
        self._signals = signals
        self._pool = ThreadPoolExecutor(at_once) if at_once > 1 else None

    def __enter__(self) -> Turns:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def of(self, jobs: Sequence[Job]) -> dict[Job, str | int]:
        """Return, of each job that had its turn, whom it waits for or how it has ended; none has one after a stop."""
        if self._pool is not None:
            return dict(zip(jobs, self._pool.map(self._of_one, jobs), strict=True))
        answers: dict[Job, str | int] = {}
        for job in jobs:
            answers[job] = self._of_one(job)
            if answers[job] in process.STOPPED:
                break
        return answers

    def _of_one(self, job: Job) -> str | int:
        if self._signals.received:
            return 128 + self._signals.received[0]
        try:
            return next(job)
        except StopIteration as end:
            return int(end.value)


def run_shared(
    trial: Trial, label: str, config_file: Path | None = None, crew: Crew | None = None
) -> Generator[str, None, tuple[int, str]]:
    """Run a trial unless it is finished or until another process has finished it; return as :func:`run_trial` does.

    Yields:
        Which trial it is and who trains it, as long as that is another process.
    """
    is_left = False
    while True:
        try:
            return run_if_needed(trial, label, config_file, crew)
        except TrialOwned as owner:
            if not is_left:
                logger.info(f"{label}: left to {owner}")
            is_left = True
            yield f"{label} ({owner})"


def run_if_needed(
    trial: Trial, label: str, config_file: Path | None = None, crew: Crew | None = None
) -> tuple[int, str]:
    """Run a trial unless it is finished, and log which; return as :func:`run_trial` does.

    Raises:
        TrialOwned: another process trains it.
    """
    with claimed(trial) as owner:
        if is_finished(trial):
            log_done(trial, label)
            return 0, ""
        if owner is not None:
            raise TrialOwned(owner)
        logger.info(f"{label}: starting")
        before = process.summary_identity(trial.folder)
        code, error = run_trial(trial, config_file, crew)
        is_refused = code == LaunchError.exit_code and process.summary_identity(trial.folder) == before
        if is_refused and not on_several_nodes(trial) and (owner := find_owner(trial.folder)) is not None:
            raise TrialOwned(owner)  # one that does not claim, `afina train` or another host's, was quicker
    log_end(trial, label, code, error, crew is not None and crew.is_quiet)
    return code, error


def log_end(trial: Trial, label: str, code: int, error: str, was_quiet: bool) -> None:
    """Log how a trial ended that was begun here; a good end only where the trial was not seen while it ran."""
    if code in process.STOPPED:
        logger.info(f"{label}: stopped; the same command resumes it")
    elif code:
        logger.info(f"{label}: failed: {error}")
    elif was_quiet:
        logger.info(f"{label}: {_result(trial)}")


def log_done(trial: Trial, label: str) -> None:
    """Log that there was nothing to do for a trial."""
    logger.info(f"{label}: {'at its rung' if has_reached(trial) else 'finished'} before")


def _result(trial: Trial) -> str:
    """Say in one line how a trial ended that was not seen while it ran."""
    summary = find_summary(trial.folder)
    metrics = {"train_loss": summary.get("train_loss"), **(summary.get("metrics") or {})}
    scores = [f"{name} {value:.4f}" for name, value in metrics.items() if value is not None and "_before" not in name]
    done = "finished" if summary.get("status") == "finished" else f"stopped after step {summary.get('steps')}"
    return f"{done} in {summary.get('wall_seconds') or 0:.0f} s: {', '.join(scores)}"


@contextmanager
def claimed(trial: Trial) -> Iterator[str | None]:
    """Claim a trial inside the ``with`` block, from before its process has started; yield whose it is where it is
    another's."""
    if on_several_nodes(trial):
        yield None
        return
    folder = trial.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with try_lock(folder.with_name(f".{folder.name}.claim.lock")) as is_free:
        yield find_owner(folder) or (None if is_free else "another process, which is starting it")


def on_several_nodes(trial: Trial) -> bool:
    """Return whether the same command runs on every node: then they train the trial together."""
    return trial.config.launch.kind == "torchrun" and trial.config.launch.nodes > 1


def is_finished(trial: Trial) -> bool:
    """Return whether it is finished, and with what changes the result as here: a name may have been given twice."""
    is_done = find_summary(trial.folder).get("status") == "finished" or has_reached(trial)
    if trial.config.run.overwrite or not is_done:
        return False
    try:
        finished_config = trainer.config.load([], trial.folder / CONFIG_FILE, only_to_compare=True)
    except AfinaError:
        return False  # the training process will report it
    return not trainer.config.changed_result_fields(finished_config, trial.config)


def default_run_name(config: TrainConfig) -> str:
    """Return the name a config would have if none were given: it holds a digest of all that changes the result."""
    return trainer.config.run_name(replace(config, run=replace(config.run, name=None)))


def digest_name(parts: Sequence[str], prefix: str) -> str:
    """Return ``prefix`` and eight hex digits that identify ``parts``, in whatever order."""
    return prefix + hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()[:8]
