"""Run trials: runs that belong together, each in a process of its own, started or found finished."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import trainer.config
from launch import process, torchrun
from launch.environment import child_environment, visible_gpus
from trainer.config import TrainConfig
from trainer.errors import AfinaError
from trainer.tracking.files import find_summary

logger = logging.getLogger(__name__)


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


def run_if_needed(trial: Trial, label: str, config_file: Path | None = None) -> tuple[int, str]:
    """Run a trial unless it is finished, and log which; return as :func:`run_trial` does."""
    if is_finished(trial):
        logger.info(f"{label}: finished before")
        return 0, ""
    logger.info(f"{label}: starting")
    code, error = run_trial(trial, config_file)
    if code in process.STOPPED:
        logger.info(f"{label}: stopped; the same command resumes it")
    elif code:
        logger.info(f"{label}: failed: {error}")
    return code, error


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
