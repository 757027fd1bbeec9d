"""Ask Slurm: submit, look at a job, requeue it, cancel it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.errors import LaunchError

TIMEOUT_SECONDS = 60
QUEUED = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED")


@dataclass(frozen=True, slots=True)
class JobState:
    """Hold what Slurm says of a job.

    Attributes:
        state: ``RUNNING``, ``PENDING``, ``COMPLETING``, ``COMPLETED``, ``TIMEOUT``, …
        reason: why it is in it: ``TimeLimit``, ``None``, ``BeginTime``, …
        is_preempted: whether a job of more weight takes its place.
    """

    state: str
    reason: str
    is_preempted: bool = False

    @property
    def is_queued(self) -> bool:
        """Return whether it waits or runs, or comes back to that."""
        return self.state in QUEUED


def has_slurm() -> bool:
    """Return whether jobs can be submitted from this machine."""
    return shutil.which("sbatch") is not None


def submit(options: Sequence[str], script: str, arguments: Sequence[str]) -> str:
    """Submit a batch script; return the job's number.

    Raises:
        LaunchError: there is no Slurm here, or it refuses the job.
    """
    return _call("sbatch", "--parsable", *options, script, *arguments).split(";")[0]


def find_job(job: str) -> JobState | None:
    """Return the state of a job (``123``, of an array ``123_4``); ``None`` where Slurm does not know it any more."""
    try:
        shown = _call("scontrol", "-o", "show", "job", job)
    except LaunchError:
        return None
    fields = dict(field.split("=", 1) for field in shown.split() if "=" in field)
    preempted = fields.get("PreemptTime", "None") not in ("None", "Unknown", "N/A", "")
    return JobState(fields.get("JobState", "UNKNOWN"), fields.get("Reason", "None"), preempted)


def requeue(job: str) -> None:
    """Put a job back into the queue.

    Raises:
        LaunchError: Slurm refuses.
    """
    _call("scontrol", "requeue", job)


def cancel(job: str) -> None:
    """Cancel a job: its processes get a SIGTERM and have the cluster's KillWait to save.

    Raises:
        LaunchError: Slurm refuses.
    """
    _call("scancel", job)


def _call(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except FileNotFoundError:
        hint = "a login node of a Slurm cluster, or launch=torchrun"
        raise LaunchError(command[0], reason="is not on this machine's PATH", hint=hint) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LaunchError(command[0], reason=f"did not answer ({error})") from error
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())
        raise LaunchError(command[0], reason=said or f"ended with {done.returncode}", hint="scontrol ping; sinfo")
    return done.stdout.strip()
