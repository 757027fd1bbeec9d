"""Run one training job as a child process: pass signals on, and read from its run folder how it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from launch.stop_signals import STOP_SIGNALS, stop_signals
from trainer.errors import LAUNCHER_PIDS, AfinaError, LaunchError
from trainer.tracking.files import SUMMARY_FILE, find_summary

# What `trainer.train` ends with when it was asked to stop and saved (EX_TEMPFAIL): the same command resumes there.
PREEMPTED = 75
STOPPED = frozenset([PREEMPTED, *(128 + number for number in STOP_SIGNALS)])


def run(command: Sequence[str], environment: dict[str, str], folder: Path, output: Path | None = None) -> int:
    """Run a training job to its end.

    Args:
        command: what to start; it trains into ``folder``.
        environment: all of the child's environment.
        folder: the run folder, whose summary holds how the job ended.
        output: a file that what it prints is added to; ``None``: it prints where this process does.

    Returns:
        An exit code: 0 for a finished run, the error's own code (see `trainer.errors`) for a failed one, 75 for one
        that was stopped and can go on, 128 + signal for one that was stopped before it could save.

    Raises:
        LaunchError: the processes died without a word of why in the run folder.
    """
    before = summary_identity(folder)
    code, stopped_by = _wait(command, environment, output)
    return exit_code(folder, before, code, stopped_by)


def exit_code(folder: Path, before: tuple[int, int] | None, code: int, stopped_by: int | None) -> int:
    """Return how a job ended, by what it left in its run folder; results and errors as of :func:`run`.

    Args:
        folder: the run folder.
        before: :func:`summary_identity` of it at the job's start.
        code: the process's own code; negative: it was killed by that signal.
        stopped_by: the signal by which it was asked to stop.
    """
    if summary_identity(folder) == before:
        # nothing was written by this job: a finished run started again (code 0), or a death before the run folder
        return _without_summary(code, stopped_by, folder)
    return code_of(find_summary(folder), code)


def code_of(summary: Mapping[str, Any], code: int) -> int:
    """Return how a run ended by its summary: torchrun's own code is non-zero after a clean stop, so its word counts.

    Args:
        summary: that it has left.
        code: the process's own code.
    """
    if summary.get("status") == "finished":
        return 0
    if summary.get("status") == "preempted":
        return PREEMPTED
    codes = {error.kind: error.exit_code for error in AfinaError.__subclasses__()}
    kind = str((summary.get("error") or {}).get("kind"))
    return codes.get(kind, code if 0 < code < 128 else 1)


def summary_identity(folder: Path) -> tuple[int, int] | None:
    """Return what tells one summary file from the next: it is replaced, never edited, so inode or time differ."""
    try:
        status = (folder / SUMMARY_FILE).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def pause(seconds: float) -> int:
    """Wait so long; return 0, or at once 128 + signal when it was asked to stop."""
    with stop_signals() as signals:
        end = time.monotonic() + seconds
        while not signals.received and time.monotonic() < end:
            time.sleep(0.1)
        return 128 + signals.received[0] if signals.received else 0


def _without_summary(code: int, stopped_by: int | None, folder: Path) -> int:
    if code == 0:
        return 0
    if stopped_by is not None:
        return 128 + stopped_by
    if code < 0:
        raise LaunchError(
            f"training process of {folder}",
            reason=f"was killed by {signal.Signals(-code).name} and left no summary",
            hint="was it the kernel, out of memory (dmesg)? the same command starts it again",
        )
    return code


class _Child:
    """A process that was started here."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def stop(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """Kill it and its workers; torchrun gives every worker a process group of its own."""
        pid, workers = self.process.pid, []
        with suppress(OSError):
            workers = [int(worker) for worker in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        self.process.kill()
        for worker in workers:
            with suppress(OSError):
                os.killpg(worker, signal.SIGKILL)


def _wait(command: Sequence[str], environment: dict[str, str], output: Path | None) -> tuple[int, int | None]:
    """Start the child and wait for it. Returns its code (negative: killed by that signal) and the signal we passed on.

    The child has a session of its own, so a Ctrl-C reaches it once, through us.
    """
    # a run whose launcher is killed would go on with nobody to stop it
    environment = {**environment, LAUNCHER_PIDS: str(os.getpid())}
    with stop_signals() as signals, ExitStack() as held:
        try:
            log = None if output is None else held.enter_context(output.open("ab"))
            child = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        except OSError as error:
            raise LaunchError(f"cannot start {command[0]}", reason=str(error)) from error
        with signals.told_to(_Child(child)):
            code = child.wait()
        return code, signals.received[0] if signals.received else None
