"""Say how runs and sweeps stand, follow their logs, and stop them: by their folders, and by Slurm where it is there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launch.slurm import queue
from launch.slurm.job import read_records
from launch.slurm.submit import read_job
from trainer.errors import LaunchError
from trainer.files import find_owner
from trainer.tracking.files import METRICS_FILE, STOP_FILE, find_summary, read_metrics

IN_QUEUE = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED")
FOLLOW_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Standing:
    """Hold how a run stands.

    Attributes:
        folder: of the run.
        status: ``training``, ``queued``, ``finished``, ``preempted``, ``failed``, ``begun`` (and left, by no word of
            its own), ``submitted`` (and gone before it began).
        step: the last one that is logged; ``None`` before the first.
        job: its Slurm job, as the user types it.
        detail: who trains it, what Slurm says, how it ended.
    """

    folder: Path
    status: str
    step: int | None
    job: str | None
    detail: str


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run's: trained, training, or submitted."""
    return (folder / METRICS_FILE).exists() or (folder / "config.yaml").exists() or read_job(folder) is not None


def standing(folder: Path) -> Standing:
    """Look at a run's folder, its lock, and its job."""
    summary = find_summary(folder)
    metrics = read_metrics(folder) if (folder / METRICS_FILE).exists() else []
    step = max((int(record["step"]) for record in metrics), default=None)
    job = read_job(folder) or next((str(r.get("job")) for r in reversed(read_records(folder))), None)
    found = queue.find_job(job) if job and queue.has_slurm() else None
    if (owner := find_owner(folder)) is not None:
        return Standing(folder, "training", step, job, owner)
    if found and found.state in IN_QUEUE and found.state != "RUNNING":
        return Standing(folder, "queued", step, job, f"{found.state.lower()} ({found.reason})")
    if found and found.state == "RUNNING":
        return Standing(folder, "training", step, job, "job is running")
    status = summary.get("status")
    if status is None:
        begun = "begun" if metrics else "submitted"
        return Standing(folder, begun, step, job, found.state.lower() if found else "left without a word")
    detail = (summary.get("error") or {}).get("message") or summary.get("stopped_by") or ""
    return Standing(folder, str(status), step, job, str(detail))


def follow(folder: Path, lines: int, follows: bool) -> Iterator[str]:
    """Yield the last lines of a run's log and of Slurm's output; then, where asked, what comes, until the run ends.

    Raises:
        LaunchError: there is no log yet.
    """
    files = sorted([*folder.glob("slurm-*.out"), *folder.glob("log.txt")])
    if not files:
        raise LaunchError(f"run {folder}", reason="has no log yet", hint=f"afina status {folder}")
    # Slurm's output has the run's lines too, and what its script says.
    newest = max(files, key=lambda file: (file.suffix == ".out", file.stat().st_mtime))
    with newest.open(encoding="utf-8", errors="replace") as log:
        yield from log.readlines()[-lines:]
        while follows:
            if line := log.readline():
                yield line
            elif standing(folder).status not in ("training", "queued"):
                yield from log.readlines()
                return
            else:
                time.sleep(FOLLOW_SECONDS)


def stop(folder: Path) -> str:
    """Stop a run: a Slurm job is cancelled, which lets it save; another is asked to save and leave. Says what was done.

    Raises:
        LaunchError: nobody trains it.
    """
    found = standing(folder)
    if found.status not in ("training", "queued"):
        raise LaunchError(f"run {folder}", reason=f"is {found.status}, and nobody trains it")
    if found.job and queue.has_slurm() and (state := queue.find_job(found.job)) and state.state in IN_QUEUE:
        queue.cancel(found.job)
        return f"job {found.job} is cancelled; the run saves first, and the same command goes on"
    (folder / STOP_FILE).touch()
    return f"{folder} is asked to stop ({found.detail}): it finishes the step and saves"
