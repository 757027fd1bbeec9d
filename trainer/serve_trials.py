"""Train runs in forks of this process, which has imported what all of them import: ten seconds that each one saves.

``python -m trainer.serve_trials ANSWERS`` reads jobs from stdin and writes answers to the file descriptor ``ANSWERS``,
both JSON, one a line. A job is ``{"id", "arguments" (of trainer.train), "environment" (variables; null: unset),
"output" (a file for what it prints, or null)}``; the answers to it are ``{"id", "pid"}`` at its start and
``{"id", "code"}`` at its end (negative: killed by that signal). The first answer of all is ``{"ready", "reason"}``.

A run is a process of its own, as one that was started by itself: a crash, memory and signals are its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

import trainer.train as command
from trainer.distributed.process_group import leave
from trainer.errors import LAUNCHER_PIDS

# A server that took them would leave its runs without anybody to wait for them; they get their own.
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class TrialServer:
    """Forks a run for each job, as many at once as it is given, until stdin ends and the last one has.

    Args:
        answers: file descriptor that answers are written to.
    """

    def __init__(self, answers: int) -> None:
        self._answers = answers
        self._running: dict[int, int] = {}  # job by process
        self._handlers = {number: signal.signal(number, signal.SIG_IGN) for number in _STOP_SIGNALS}
        self._wake, waker = os.pipe()
        os.set_blocking(waker, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # what is ignored wakes nobody
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)

    def serve(self) -> None:
        """Load the libraries, then run jobs."""
        command.load_libraries()
        reason = why_not_forked()
        self._answer(ready=reason is None, reason=reason)
        if reason is not None:
            return
        rest, is_open = b"", True
        with selectors.DefaultSelector() as ready:
            ready.register(sys.stdin.fileno(), selectors.EVENT_READ)
            ready.register(self._wake, selectors.EVENT_READ)
            while is_open or self._running:
                for key, _ in ready.select():
                    if key.fd == self._wake:
                        os.read(self._wake, 4096)
                        continue
                    read = os.read(key.fd, 1 << 16)
                    if not read:
                        is_open = False
                        ready.unregister(key.fd)
                    *lines, rest = (rest + read).split(b"\n")
                    for line in lines:
                        self._fork(json.loads(line))
                self._collect()

    def _fork(self, job: Mapping[str, Any]) -> None:
        pid = os.fork()
        if not pid:
            self._be_run(job)
        self._running[pid] = job["id"]
        self._answer(id=job["id"], pid=pid)

    def _collect(self) -> None:
        for pid in list(self._running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self._answer(id=self._running.pop(pid), code=os.waitstatus_to_exitcode(status))

    def _be_run(self, job: Mapping[str, Any]) -> NoReturn:
        """Be the run: this process is the fork, and ends here."""
        code = 1
        try:
            server = os.getppid()
            os.setsid()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            os.close(self._answers)
            os.close(self._wake)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            if job["output"] is not None:
                file = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
                os.dup2(file, 1)
                os.dup2(file, 2)
            for name, value in job["environment"].items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            os.environ[LAUNCHER_PIDS] = ",".join([*os.environ.get(LAUNCHER_PIDS, "").split(","), str(server)])
            sys.argv = [str(Path(command.__file__)), *job["arguments"]]
            code = command.main(job["arguments"])
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
        leave(code)

    def _answer(self, **answer: Any) -> None:
        # a launcher that is gone hears nothing more; its runs see that themselves
        with contextlib.suppress(OSError):
            os.write(self._answers, json.dumps(answer).encode() + b"\n")


def why_not_forked() -> str | None:
    """Return why a fork of this process cannot train, or ``None``: CUDA serves no fork of a process that has used it.

    Tried on a fork: a library's import may have used CUDA unseen.
    """
    if not torch.cuda.is_available():
        return None
    pid = os.fork()
    if not pid:
        code = 1
        try:
            torch.zeros(1, device="cuda").add(1).item()
            code = 0
        finally:
            os._exit(code)
    return "a library has used CUDA while it was imported" if os.waitpid(pid, 0)[1] else None


if __name__ == "__main__":
    TrialServer(int(sys.argv[1])).serve()
    leave(0)
