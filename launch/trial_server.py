"""Start trials as forks of one process (`trainer.serve_trials`), in which the libraries have been loaded once."""

from __future__ import annotations

import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch import process
from launch.stop_signals import StopSignals, stop_signals
from trainer.errors import LAUNCHER_PIDS, LaunchError

CLOSE_SECONDS = 30.0


class CannotFork(Exception):
    """Forks of a loaded process cannot train here; the message says why."""


class _Fork:
    """One trial, as the launcher sees it: what it is told, and the process once that is known."""

    def __init__(self, server: TrialServer) -> None:
        self.answers: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self.pid: int | None = None
        self._server = server
        self._wanted: int | None = None

    def began(self, pid: int) -> None:
        self.pid = pid
        if self._wanted is not None:
            self._send(self._wanted)

    def stop(self, number: int) -> None:
        self._wanted = number
        if self.pid is not None:
            self._send(number)
        elif not self._server.is_ready:
            self._server.kill()  # nothing runs in it yet

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        with suppress(OSError):
            if self.pid is not None:
                os.kill(self.pid, number)


class TrialServer:
    """A process that forks trials, started at the first one; used by several threads at once.

    Args:
        environment: all of its environment, and of its trials.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._forks: dict[int, _Fork] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self.is_ready = False
        self.why_not: str | None = None

    def run(
        self,
        arguments: Sequence[str],
        folder: Path,
        variables: Mapping[str, str | None] | None = None,
        output: Path | None = None,
    ) -> int:
        """Run one trial to its end; returns and raises as :func:`launch.process.run`.

        Args:
            arguments: of `trainer.train`.
            folder: the run folder.
            variables: of its environment, where they differ from the server's; ``None`` unsets one.
            output: a file that what it prints is added to; ``None``: it prints where this process does.

        Raises:
            CannotFork: a process of its own must be started instead.
        """
        before = process.summary_identity(folder)
        with stop_signals() as signals:
            number, fork = self._open()
            job = {"id": number, "arguments": list(arguments), "environment": dict(variables or {})}
            job["output"] = None if output is None else str(output.absolute())
            with signals.told_to(fork):
                self._tell(job)
                code = self._wait(fork, signals, folder)
            return process.exit_code(folder, before, code, signals.received[0] if signals.received else None)

    def close(self) -> None:
        """End the server: its trials have ended."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()

    def kill(self) -> None:
        """Kill the server; trials that it has begun see that, save and leave."""
        if self._process is not None:
            self._process.kill()

    def _wait(self, fork: _Fork, signals: StopSignals, folder: Path) -> int:
        """Wait for the end of a trial; return its process's code."""
        while (answer := fork.answers.get()) is not None:
            if "code" in answer:
                return int(answer["code"])
            fork.began(answer["pid"])
        if self.why_not is not None:
            raise CannotFork(self.why_not)
        if signals.received:
            return -signals.received[0]
        raise LaunchError(
            f"training process of {folder}",
            reason="is lost: the process that starts trials has died",
            hint="the same command goes on",
        )

    def _open(self) -> tuple[int, _Fork]:
        """Enter a new trial, and start the server where there is none."""
        with self._lock:
            if self.why_not is not None:
                raise CannotFork(self.why_not)
            if self._process is None or self._process.poll() is not None:
                self._start()
            number, fork = next(self._numbers), _Fork(self)
            self._forks[number] = fork
            return number, fork

    def _tell(self, job: Mapping[str, Any]) -> None:
        with self._lock, suppress(OSError):  # of a server that has died the reader tells
            assert self._process is not None
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()

    def _start(self) -> None:
        self.is_ready = False
        ours, theirs = os.pipe()
        # asked otherwise, torch's "is there a GPU" begins to use it, and CUDA then serves no fork
        variables = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", LAUNCHER_PIDS: str(os.getpid())}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "trainer.serve_trials", str(theirs)],
                stdin=subprocess.PIPE,
                pass_fds=[theirs],
                env={**self._environment, **variables},
                start_new_session=True,
            )
        except OSError as error:
            os.close(ours)
            raise LaunchError(f"cannot start {sys.executable}", reason=str(error)) from error
        finally:
            os.close(theirs)
        self._forks = {}
        read = (self._process, ours, self._forks)
        threading.Thread(target=self._read, args=read, name="trial answers", daemon=True).start()

    def _read(self, server: subprocess.Popen[bytes], answers: int, forks: dict[int, _Fork]) -> None:
        """Hand each answer to its trial; ``None`` to those of a server that has ended."""
        with open(answers, "rb") as lines:
            for line in lines:
                answer = json.loads(line)
                if "ready" in answer:
                    self.why_not, self.is_ready = answer["reason"], answer["ready"]
                else:
                    fork = forks.pop(answer["id"]) if "code" in answer else forks[answer["id"]]
                    fork.answers.put(answer)
        server.wait()
        with self._lock:
            left = list(forks.values())
        for fork in left:
            fork.answers.put(None)
