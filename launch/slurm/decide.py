"""Decide whether a job goes back into the queue when its processes have ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launch.slurm.queue import JobState
from trainer.errors import CheckpointError, ConfigError, LaunchError, TrainingError

# A restart meets these again: a wrong key, a checkpoint that does not fit, memory that is too small.
LASTING = {
    *(ConfigError.exit_code, CheckpointError.exit_code, LaunchError.exit_code, TrainingError.exit_code),
    130,  # a second Ctrl-C
}
MAX_IDLE_RESTARTS = 2


@dataclass(frozen=True, slots=True)
class Life:
    """Hold what one start of a job came to.

    Attributes:
        code: exit code of its processes, as srun gives it.
        status: of the run's summary, where this life wrote one: ``finished``, ``preempted``, ``failed``.
        error: ``{"kind": …, "message": …}`` of a failed one.
        stopped_by: what asked the run to stop, where something did.
        first_step: the step that was saved when it began.
        saved_step: the step that is saved now.
        restarts: how often the job was requeued before.
    """

    code: int
    status: str | None
    error: dict[str, str] | None
    stopped_by: str | None
    first_step: int
    saved_step: int
    restarts: int

    @property
    def is_idle(self) -> bool:
        """Return whether it was a restart that has saved no new step."""
        return self.restarts > 0 and self.saved_step <= self.first_step


def decide(
    life: Life, earlier: Sequence[Life], job: JobState | None, max_requeues: int, wished: Sequence[str]
) -> tuple[bool, str]:
    """Return whether to requeue the job, and why or why not, as the end of a sentence.

    Args:
        life: that has just ended.
        earlier: lives of the same job that have ended by themselves, the oldest first.
        job: what Slurm says of it; ``None``: it says nothing.
        max_requeues: ``launch.max_requeues``.
        wished: what ``stopped_by`` says where it was the user's wish.
    """
    if life.status == "finished":
        return False, "finished"
    if job is None:
        return False, "Slurm does not answer; the same command goes on"
    at_limit = job.reason == "TimeLimit"
    if job.state != "RUNNING" and not at_limit and not job.is_preempted:
        # Slurm has ended it: cancelled by its user, or requeued by somebody, which needs nothing of ours.
        return False, "cancelled"
    if life.status == "preempted" and life.stopped_by in wished:
        return False, f"stopped by {life.stopped_by}; the same command goes on"
    # A rank that was lost is told as an error of launch by a run that had begun.
    was_lost = life.status == "failed" and (life.error or {}).get("kind") == LaunchError.kind
    if life.code in LASTING and life.status != "preempted" and not was_lost:
        return False, "an error that a restart would meet again"
    if life.restarts >= max_requeues:
        return False, f"requeued {life.restarts} times, as often as launch.max_requeues allows"
    idle = 0
    for each in [life, *reversed(earlier)]:
        if not each.is_idle:
            break
        idle += 1
    if idle >= MAX_IDLE_RESTARTS:
        return False, f"{idle} restarts in a row have saved no step after {life.saved_step}"
    if at_limit:
        return True, "at the time limit"
    if job.is_preempted:
        return True, "preempted"
    if life.status == "preempted":
        return True, f"asked to stop by {life.stopped_by}"
    return True, f"its processes died ({(life.error or {}).get('message') or f'exit code {life.code}'})"
