"""Run one training job as a child process: pass signals on, and read from its run folder how it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from trainer.errors import LAUNCHER_PIDS, AfinaError, LaunchError
from trainer.tracking.files import SUMMARY_FILE, find_summary

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# What `trainer.train` ends with when it was asked to stop and saved (EX_TEMPFAIL): the same command resumes there.
PREEMPTED = 75
STOPPED = frozenset([PREEMPTED, *(128 + number for number in STOP_SIGNALS)])


def run(command: Sequence[str], environment: dict[str, str], folder: Path) -> int:
    """Run a training job to its end.

    Args:
        command: what to start; it trains into ``folder``.
        environment: all of the child's environment.
        folder: the run folder, whose summary holds how the job ended.

    Returns:
        An exit code: 0 for a finished run, the error's own code (see `trainer.errors`) for a failed one, 75 for one
        that was stopped and can go on, 128 + signal for one that was stopped before it could save.

    Raises:
        LaunchError: the processes died without a word of why in the run folder.
    """
    before = summary_identity(folder)
    code, stopped_by = _wait(command, environment)
    if summary_identity(folder) == before:
        # nothing was written by this job: a finished run started again (code 0), or a death before the run folder
        return _without_summary(code, stopped_by, folder)
    # torchrun's own code is non-zero after a clean stop, so the run's word counts
    summary = find_summary(folder)
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
    received: list[int] = []
    previous = {number: signal.signal(number, lambda got, _: received.append(got)) for number in STOP_SIGNALS}
    try:
        end = time.monotonic() + seconds
        while not received and time.monotonic() < end:
            time.sleep(0.1)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 128 + received[0] if received else 0


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


def _wait(command: Sequence[str], environment: dict[str, str]) -> tuple[int, int | None]:
    """Start the child and wait for it. Returns its code (negative: killed by that signal) and the signal we passed on.

    The child has a session of its own, so a Ctrl-C reaches it once, through us: torchrun's agent takes a second signal
    while it waits for its workers as a reason to leave them behind. For the same reason only the first is passed on.
    """
    child: subprocess.Popen[bytes] | None = None
    received: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if child is None:
            return
        if len(received) == 1:
            child.send_signal(_gentle(number))
            print("stopping: waiting for the run to save (Ctrl-C kills it)", file=sys.stderr)
        elif number == signal.SIGINT:
            _kill(child)

    previous = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        # a run whose launcher is killed would go on with nobody to stop it
        environment = {**environment, LAUNCHER_PIDS: str(os.getpid())}
        child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        if received:  # came while it was being started
            child.send_signal(_gentle(received[0]))
        code = child.wait()
    except OSError as error:
        raise LaunchError(f"cannot start {command[0]}", reason=str(error)) from error
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code, received[0] if received else None


def _gentle(number: int) -> int:
    """The signal that asks a run to save and leave, by which torchrun's agent waits for its workers, too."""
    return number if number == signal.SIGUSR1 else signal.SIGTERM


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Kill a child and its workers; torchrun gives every worker a process group of its own."""
    workers: list[int] = []
    with suppress(OSError):
        workers = [int(pid) for pid in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()]
    child.kill()
    for pid in workers:
        with suppress(OSError):
            os.killpg(pid, signal.SIGKILL)
