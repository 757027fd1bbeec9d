"""Run trials that one process trains together, on one base (`trainer.train --together FILE`).

A group is a job in place of its trials. Each trial is a run as any other: it is claimed, found finished, left to who
trains it already, and how it ended is what its own summary says; the same trials may be trained one by one later on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import launch.trials
from launch import process, torchrun
from launch.crew import Crew
from launch.environment import without_names_of_one_run
from launch.trials import Trial, claimed, digest_name, has_reached, is_finished, log_done, log_end, without_reason
from trainer.config.together import Group, group
from trainer.errors import TRIAL, AfinaError, LaunchError, NotSharedError, TooManyTrialsError, TrainingError
from trainer.files import find_owner, try_lock, write_atomically
from trainer.tracking.files import find_summary

FOLDER = ".together"
"""In a sweep's folder: a folder a group."""
GROUP_FILE = "group.json"
PLANNED_STOPS = (None, "run.stop_at_step", "sweep.early_stopping")
"""What has stopped a trial that stands at its step or its rung, in its summary."""
# How the message of a run begins whose memory has run out (trainer/training/out_of_memory.py)
OUT_OF_MEMORY = ("out of device memory", "out of host memory")

Outcomes = dict[str, tuple[int, str]]
"""Of trials by their names: exit code and, of a failed one, why."""

logger = logging.getLogger(__name__)


def group_trials(trials: Sequence[Trial], fuse: str | int, at_once: int = 1) -> list[Group]:
    """Group trials that one process can train, as :func:`trainer.config.together.group` does."""
    return group([trial.config for trial in trials], fuse, at_once)


class TrialGroup:
    """Trials that one process trains together.

    Args:
        trials: two or more that are alike.
        folder: of the sweep; the group has a folder of its own there, by its trials' names.
        labels: what each trial is called in the log, by its name.
        config_file: what their overrides are on top of.
        crew: what the process runs on; ``None``: all devices.

    Attributes:
        obstacle: why they cannot be trained together on their model, once that has been seen.
        most: how many can be, then.
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        folder: Path,
        labels: Mapping[str, str],
        config_file: Path | None = None,
        crew: Crew | None = None,
    ) -> None:
        assert len(trials) > 1, "one trial is a run by itself"
        self.folder = folder / FOLDER / digest_name([trial.name for trial in trials], "")
        self._sweep = folder
        self.obstacle: str | None = None
        self.most = len(trials)
        self._trials, self._labels = list(trials), labels
        self._config_file, self._crew = config_file, crew

    def run(self) -> Generator[str, None, Outcomes]:
        """Run those that are not finished, and wait for those that another process trains.

        Returns:
            The outcomes of all; after a stop those of the trials that there was time for.

        Yields:
            A trial and who trains it, as long as that is another process.
        """
        outcomes: Outcomes = {}
        left = self._trials
        told: set[str] = set()
        while True:
            found, owners = self._run_free(left)
            outcomes |= found
            left = [trial for trial in left if trial.name not in outcomes]
            if not left or any(code in process.STOPPED for code, _ in found.values()):
                return outcomes
            for name in owners.keys() - told:
                logger.info(f"{self._labels[name]}: left to {owners[name]}")
            told |= owners.keys()
            if owners:
                name = next(trial.name for trial in left if trial.name in owners)
                yield f"{self._labels[name]} ({owners[name]})"

    def run_halved(self, halving: Mapping[str, Any]) -> Outcomes:
        """Run all trials from rung to rung in one process; no outcome where another process trains one of them, or the
        model cannot be shared.

        Args:
            halving: ``min_steps`` (of the first rung), ``reduction_factor``, ``metric``, ``lower_is_better``.
        """
        with self._claimed(self._trials) as owners:
            return {} if owners else self._train(self._trials, halving)

    def _run_free(self, trials: Sequence[Trial]) -> tuple[Outcomes, dict[str, str]]:
        """Run those trials that nobody else trains; return their outcomes, and who trains the others."""
        if all(map(is_finished, trials)):
            return self._done(trials), {}
        with self._claimed(trials) as owners:
            done = [trial for trial in trials if is_finished(trial)]
            owners = {trial.name: owners[trial.name] for trial in trials if trial.name in owners and trial not in done}
            free = [trial for trial in trials if trial not in done and trial.name not in owners]
            return self._done(done) | (self._train(free) if free else {}), owners

    def _done(self, trials: Sequence[Trial]) -> Outcomes:
        for trial in trials:
            log_done(trial, self._labels[trial.name])
        return {trial.name: (0, "") for trial in trials}

    @contextmanager
    def _claimed(self, trials: Sequence[Trial]) -> Iterator[dict[str, str]]:
        """Claim trials inside the ``with`` block; yield whose those are that are another's, by name.

        The group is claimed first: two equal sweeps that claimed its trials at the same time would each get some.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with try_lock(self.folder / "claim.lock") as is_free, ExitStack() as claims:
            if is_free:
                held = {trial.name: claims.enter_context(claimed(trial)) for trial in trials}
                yield {name: owner for name, owner in held.items() if owner is not None}
            else:
                other = "another process, which is starting it"
                yield {trial.name: find_owner(trial.folder) or other for trial in trials}

    def _train(self, trials: Sequence[Trial], halving: Mapping[str, Any] | None = None) -> Outcomes:
        """Run the process of these trials to its end; none has an outcome where another was quicker to train one."""
        before = {trial.name: process.summary_identity(trial.folder) for trial in trials}
        if len(trials) == 1:
            (trial,) = trials
            logger.info(f"{self._labels[trial.name]}: starting")
            outcomes = {trial.name: launch.trials.run_trial(trial, self._config_file, self._crew)}
        else:
            logger.info(f"{self._label(trials)}: starting {len(trials)} trials in one process")
            code, reason = run_group(trials, self.folder, self._config_file, self._crew, halving)
            new = {
                trial.name: find_summary(trial.folder)
                for trial in trials
                if process.summary_identity(trial.folder) != before[trial.name]
            }
            kind, self.obstacle = _obstacle(new)
            if self.obstacle is not None:
                size = len(trials) // 2 if kind == TooManyTrialsError.kind else 1
                self.most = size
                how = f"{size} at a time" if size > 1 else "each by itself"
                logger.info(f"{self._label(trials)}: {how}: {self.obstacle}")
                return {} if halving is not None else self._train_in_parts(trials, size)
            outcomes = {trial.name: _outcome(trial, new, code, reason, halving is not None) for trial in trials}
            outcomes = _with_hint(outcomes, len(trials))
        is_refused = {code for code, _ in outcomes.values()} == {LaunchError.exit_code}
        is_refused = is_refused and all(process.summary_identity(t.folder) == before[t.name] for t in trials)
        if is_refused and any(find_owner(trial.folder) for trial in trials):
            return {}
        for trial in trials:
            was_quiet = self._crew is not None and self._crew.is_quiet
            log_end(trial, self._labels[trial.name], *outcomes[trial.name], was_quiet)
        return outcomes

    def _train_in_parts(self, trials: Sequence[Trial], size: int) -> Outcomes:
        """Train so many trials at a time, in groups of their own, until one is stopped."""
        outcomes: Outcomes = {}
        for begin in range(0, len(trials), size):
            part = trials[begin : begin + size]
            if len(part) == 1:
                outcomes |= self._train(part)
            else:
                group = TrialGroup(part, self._sweep, self._labels, self._config_file, self._crew)
                outcomes |= group._train(part)
                self.most = min(self.most, group.most)
            if any(code in process.STOPPED for code, _ in outcomes.values()):
                break
        return outcomes

    def _label(self, trials: Sequence[Trial]) -> str:
        return ", ".join(self._labels[trial.name] for trial in trials)


def run_group(
    trials: Sequence[Trial],
    folder: Path,
    config_file: Path | None = None,
    crew: Crew | None = None,
    halving: Mapping[str, Any] | None = None,
) -> tuple[int, str]:
    """Run the process that trains trials together; return its exit code and, when it failed as a whole, why.

    Args:
        trials: which it trains; how each of them ended is in its summary.
        folder: of the group; its file is written there.
        config_file: a config.yaml to start from instead of `conf/`.
        crew: what it runs on; ``None``: a process of its own on all devices.
        halving: as of :meth:`TrialGroup.run_halved`.
    """
    config = trials[0].config
    content = {
        "config": None if config_file is None else str(config_file),
        "trials": [list(trial.overrides) for trial in trials],
        "halving": None if halving is None else dict(halving),
    }
    file = folder / GROUP_FILE
    write_atomically(file, json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")
    arguments, output = ["--together", str(file)], None
    try:
        if config.launch.kind == "torchrun":
            with without_names_of_one_run():
                code = torchrun.run(config, arguments, folder, {TRIAL: "1"})
        else:
            code, output = (crew or Crew(forks=False)).run(arguments, folder)
    except AfinaError as error:
        return error.exit_code, str(error)
    return code, without_reason(code, output) if code and code not in process.STOPPED else ""


def _outcome(trial: Trial, new: Mapping[str, Any], code: int, reason: str, is_halved: bool) -> tuple[int, str]:
    """Return how a trial of a group ended.

    Args:
        trial: which.
        new: the summaries that the group's process has written, by the names of trials.
        code: of the process.
        reason: why it failed as a whole.
        is_halved: whether it decided itself at which rung a trial stops.
    """
    summary = new.get(trial.name)
    if summary is None:
        summary = find_summary(trial.folder)
        is_done = summary.get("status") == "finished" or has_reached(trial)
        is_done = is_done or (is_halved and summary.get("status") == "preempted")  # left behind in an earlier life
        if code == 0:
            return (0, "") if is_done else (1, "the process of its group has ended without a word of it")
        return code, _short_of_memory(new) or reason
    if summary.get("status") == "failed":
        message = (summary.get("error") or {}).get("message")
        return process.code_of(summary, code), message or reason
    ended = process.code_of(summary, code)
    is_at_step = has_reached(trial) or (is_halved and summary.get("stopped_by") in PLANNED_STOPS)
    return (0, "") if ended == process.PREEMPTED and is_at_step else (ended, "")


def _obstacle(new: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return of what kind it is and why the process of a group could not put its trials on one model; no reason where
    that was not it."""
    kinds = (NotSharedError.kind, TooManyTrialsError.kind)
    errors = [summary.get("error") or {} for summary in new.values()]
    return next(((str(e["kind"]), str(e.get("message"))) for e in errors if e.get("kind") in kinds), ("", None))


def _short_of_memory(new: Mapping[str, Any]) -> str | None:
    """Return why a process died that has said of one trial that there was no memory left."""
    messages = [str((summary.get("error") or {}).get("message")) for summary in new.values()]
    return next((message for message in messages if message.startswith(OUT_OF_MEMORY)), None)


def _with_hint(outcomes: Outcomes, count: int) -> Outcomes:
    """Say what takes less memory, of trials that have failed for want of it."""
    hint = f"sweep.fuse={count // 2 if count > 3 else 'off'} takes less memory"
    short = {
        name: (code, f"{error}; {hint}")
        for name, (code, error) in outcomes.items()
        if (code == TrainingError.exit_code and error.startswith(OUT_OF_MEMORY)) or "killed by SIGKILL" in error
    }
    return outcomes | short
