"""Say how runs and sweeps stand, follow their logs, and stop them: by their folders, and by Slurm where it is there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launch.report.runs import status_of
from launch.slurm import queue
from launch.slurm.job import LIVES_FILE
from launch.slurm.submit import read_job
from trainer.errors import LaunchError
from trainer.files import find_owner, read_json_lines
from trainer.tracking.files import METRICS_FILE, RUN_FILES, STOP_FILE, find_summary, read_metrics

FOLLOW_SECONDS = 1.0
LOOK_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Standing:
    """Hold how a run stands.

    Attributes:
        folder: of the run.
        status: as of ``launch.report.runs.Run``, or ``queued``: its job waits in Slurm's queue.
        step: the last one that is logged; ``None`` before the first.
        job: its Slurm job, as the user types it.
        is_queued: whether Slurm still has that job, waiting or running.
        detail: who trains it, what Slurm says, how it ended.
    """

    folder: Path
    status: str
    step: int | None
    job: str | None
    is_queued: bool
    detail: str

    @property
    def is_live(self) -> bool:
        """Return whether somebody trains it, or will."""
        return self.status in ("running", "queued")


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run's: trained, training, or submitted."""
    return any((folder / name).exists() for name in RUN_FILES) or read_job(folder) is not None


def standing(folder: Path) -> Standing:
    """Look at a run's folder, its lock, and its job."""
    summary, owner = find_summary(folder), find_owner(folder)
    metrics = read_metrics(folder) if (folder / METRICS_FILE).exists() else []
    step = max((int(record["step"]) for record in metrics), default=None)
    # submitted here, or by hand: then a life of it that has ended names it
    job = read_job(folder) or next((str(r.get("job")) for r in reversed([*read_json_lines(folder / LIVES_FILE)])), None)
    found = queue.find_job(job) if job and queue.has_slurm() else None
    status = status_of(owner, summary, bool(metrics))
    detail = owner or (summary.get("error") or {}).get("message") or summary.get("stopped_by") or ""
    is_queued = found is not None and found.is_queued
    if found is not None and is_queued and owner is None:
        status = "running" if found.state == "RUNNING" else "queued"
        detail = f"job {found.state.lower()}" + (f" ({found.reason})" if found.reason != "None" else "")
    return Standing(folder, status, step, job, is_queued, str(detail))


def follow(folder: Path, lines: int, follows: bool) -> Iterator[str]:
    """Yield the last lines of a run's log, Slurm's where it has one; then, where asked, what comes, until it ends.

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
        looked = time.monotonic()
        while follows:
            if line := log.readline():
                yield line
                continue
            if time.monotonic() - looked > LOOK_SECONDS:
                if not standing(folder).is_live:
                    yield from log.readlines()
                    return
                looked = time.monotonic()
            time.sleep(FOLLOW_SECONDS)


def stop(folder: Path) -> str:
    """Stop a run: a Slurm job is cancelled, which lets it save; another is asked to save and leave. Says what was done.

    Raises:
        LaunchError: nobody trains it.
    """
    found = standing(folder)
    if not found.is_live:
        raise LaunchError(f"run {folder}", reason=f"is {found.status}, and nobody trains it")
    if found.job and found.is_queued:
        queue.cancel(found.job)
        return f"job {found.job} is cancelled; the run saves first, and the same command goes on"
    (folder / STOP_FILE).touch()
    return f"{folder} is asked to stop ({found.detail}): it finishes the step and saves"
