"""Submit a run, or the trials of a sweep, to Slurm."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import trainer.config
from launch.slurm import queue
from launch.slurm.job import refuse_owned
from launch.slurm.script import render
from launch.slurm.snapshot import FOLDER as CODE_FOLDER
from launch.slurm.snapshot import snapshot
from launch.torchrun import train_arguments
from launch.trials import Trial
from trainer.config import TrainConfig
from trainer.errors import ConfigError, LaunchError
from trainer.files import move_aside, write_atomically
from trainer.tracking.files import CONFIG_FILE, RUN_FILES, find_summary

SCRIPT_FILE = "job.sbatch"
JOB_FILE = "slurm_job.txt"
"""In a run's or a sweep's folder, the number of the job that was submitted for it last."""
TRIALS_FOLDER = "trials"

logger = logging.getLogger(__name__)


def submit(config: TrainConfig, overrides: Sequence[str], config_file: Path | None = None) -> int:
    """Submit a run; returns 0. A finished run is not submitted again.

    Raises:
        LaunchError: somebody trains it, it is in the queue already, or Slurm refuses it.
        OSError: the run folder cannot be written.
    """
    folder = trainer.config.run_folder(config)
    if config.launch.array_parallel is not None:
        reason = "says how many trials of a sweep run at once, and this is one run"
        raise ConfigError(
            "launch.array_parallel", value=config.launch.array_parallel, reason=reason, hint="afina sweep"
        )
    if not config.run.overwrite and find_summary(folder).get("status") == "finished" and _is_same(config, folder):
        print(f"run {folder} is finished; run.overwrite=true starts it again")
        return 0
    _check_free(folder)
    words = train_arguments(config, list(overrides), config_file)
    if config.run.overwrite:  # done here, once: the job would move its own script away
        words.append("run.overwrite=false")
        if folder.exists():
            print(f"run.overwrite: the old run was moved to {move_aside(folder, RUN_FILES)}")
    job = _submit(config, folder, words, array="")
    print(f"job {job} submitted: {folder}")
    print(f"  afina status {folder}    afina logs {folder}    afina cancel {folder}")
    return 0


def submit_sweep(config: TrainConfig, folder: Path, trials: Sequence[Trial], config_file: Path | None = None) -> int:
    """Submit the trials of a sweep as one array, an element a trial; returns 0.

    Raises:
        LaunchError: it is in the queue already, or Slurm refuses it.
        OSError: the sweep's folder cannot be written.
    """
    _check_free(folder)
    arguments = folder / TRIALS_FOLDER
    arguments.mkdir(parents=True, exist_ok=True)
    for number, trial in enumerate(trials):
        words = train_arguments(trial.config, trial.overrides, config_file)
        write_atomically(arguments / str(number), b"".join(word.encode() + b"\0" for word in words))
    limit = f"%{config.launch.array_parallel}" if config.launch.array_parallel else ""
    job = _submit(config, folder, [], array=f"0-{len(trials) - 1}{limit}")
    for number, trial in enumerate(trials):
        trial.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(trial.folder / JOB_FILE, f"{job}_{number}\n".encode())
    print(f"job {job} submitted, {len(trials)} trials: {folder}")
    print(f"  afina status {folder}    afina cancel {folder}    afina report {folder}, which ranks them")
    return 0


def describe(config: TrainConfig, overrides: Sequence[str], config_file: Path | None = None) -> str:
    """Return what :func:`submit` would do: the command, and the script."""
    folder = trainer.config.run_folder(config)
    words = ["sbatch", str(folder / SCRIPT_FILE), *train_arguments(config, list(overrides), config_file)]
    return f"# would run: {shlex.join(words)}\n{render(config, folder, _setup(folder))}"


def read_job(folder: Path) -> str | None:
    """Return the number of the job that was submitted last for a run or a sweep; ``None``: none was."""
    try:
        return (folder / JOB_FILE).read_text(encoding="utf-8").strip() or None
    except (OSError, ValueError):
        return None


def _submit(config: TrainConfig, folder: Path, arguments: Sequence[str], array: str) -> str:
    if not queue.has_slurm():
        hint = "a login node of a Slurm cluster, or launch=torchrun"
        raise LaunchError("launch.kind", value="slurm", reason="sbatch is not on this machine's PATH", hint=hint)
    folder.mkdir(parents=True, exist_ok=True)
    snapshot(folder)
    script = folder / SCRIPT_FILE
    write_atomically(script, render(config, folder, _setup(folder, array), array).encode())
    job = queue.submit([f"--job-name={folder.name}"], str(script), arguments)
    write_atomically(folder / JOB_FILE, f"{job}\n".encode())
    return job


def _setup(folder: Path, array: str = "") -> list[str]:
    code = (folder / CODE_FOLDER).absolute()
    lines = [
        f"export AFINA_PYTHON=${{AFINA_PYTHON:-{shlex.quote(sys.executable)}}}",
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
    ]
    return [*lines, f"AFINA_TRIALS={shlex.quote(str((folder / TRIALS_FOLDER).absolute()))}"] if array else lines


def _check_free(folder: Path) -> None:
    refuse_owned(folder)
    job = read_job(folder)
    if job and (found := queue.find_job(job)) and found.is_queued:
        reason = f"is in the queue already: job {job}, {found.state.lower()}"
        raise LaunchError(f"run {folder}", reason=reason, hint=f"afina status {folder}; afina cancel {folder}")


def _is_same(config: TrainConfig, folder: Path) -> bool:
    """Return whether a finished run is asked for the steps that it has; for more, its own start says whether it can."""
    try:
        before = trainer.config.read_values(folder / CONFIG_FILE)
    except ConfigError:
        return True
    length = {"batch.max_steps": config.batch.max_steps, "batch.epochs": config.batch.epochs}
    return all(before.get(name) == value for name, value in length.items())
