"""``afina`` and torchrun as in ``processes``, ten seconds sooner: forks of a process that has imported everything.

For tests of what a command does. Those of how it starts (signals, imports, the launchers) start it cold.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tests.helpers.processes import RANK_ENVIRONMENT, ROOT, Finished, checked
from tests.helpers.warm_server import AFINA

LOAD_SECONDS = 120


class _Server:
    """The process that forks; one a test session, started by the first who asks."""

    def __init__(self) -> None:
        read, write = os.pipe()
        words = [sys.executable, "-m", "tests.helpers.warm_server", str(write)]
        self._process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, pass_fds=[write])
        os.close(write)
        self._answers, self._rest = read, b""
        self._ready = selectors.DefaultSelector()
        self._ready.register(read, selectors.EVENT_READ)
        atexit.register(self._process.kill)

    def run(self, job: Mapping[str, Any], timeout_seconds: float) -> int | None:
        """Return the exit code, or ``None`` after a timeout; no process of it is left behind."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()
        pids = self._answer(LOAD_SECONDS)["pids"]
        try:
            return int(self._answer(timeout_seconds)["code"])
        except TimeoutError:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            self._answer(LOAD_SECONDS)
            return None
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)

    def _answer(self, seconds: float) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while b"\n" not in self._rest:
            if not self._ready.select(max(0.0, end - time.monotonic())):
                raise TimeoutError
            read = os.read(self._answers, 1 << 16)
            assert read, "the process that forks has ended"
            self._rest += read
        line, _, self._rest = self._rest.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer


_server = cache(_Server)


def _run(
    target: str,
    arguments: tuple[str | os.PathLike[str], ...],
    *,
    ranks: int | None = None,
    file_bytes: int | None = None,
    env: Mapping[str, str],
    cwd: str | os.PathLike[str] | None = None,
    timeout_seconds: float,
    check: bool,
) -> Finished:
    __tracebackhide__ = True
    words = [os.fspath(word) for word in arguments]
    with tempfile.NamedTemporaryFile() as log:
        environment = {"OMP_NUM_THREADS": "1", **os.environ, **env}
        job = _job(target, words, log.name, environment, cwd, ranks=ranks, file_bytes=file_bytes)
        code = _server().run(job, timeout_seconds)
        output = Path(log.name).read_text(errors="replace")
    finished = Finished((target, *words), -signal.SIGKILL if code is None else code, output)
    return checked(finished, f"ran past {timeout_seconds} s" if code is None else "", check)


def _job(
    target: str,
    words: list[str],
    output: str,
    environment: Mapping[str, str],
    cwd: str | os.PathLike[str] | None,
    *,
    ranks: int | None = None,
    file_bytes: int | None = None,
) -> dict[str, Any]:
    return {
        "target": target,
        "arguments": words,
        "ranks": ranks,
        "file_bytes": file_bytes,
        "output": output,
        "cwd": os.fspath(cwd or os.getcwd()),
        "environment": dict(environment),
    }


def run_into(
    output: str,
    words: list[str],
    environment: Mapping[str, str],
    cwd: str | os.PathLike[str] | None,
    timeout_seconds: float,
) -> int | None:
    """Run the command line with stdout and stderr in a file, or what looks like one (a terminal); return the exit code,
    ``None`` after a timeout.

    Args:
        output: its path.
        words: of the command line, behind ``afina``.
        environment: all of it.
        cwd: where it runs.
        timeout_seconds: after which it is killed.
    """
    return _server().run(_job(AFINA, words, output, environment, cwd), timeout_seconds)


def afina(
    *args: str | os.PathLike[str],
    file_bytes: int | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    timeout_seconds: float = 300,
    check: bool = True,
) -> Finished:
    """The command line, as ``processes.afina``; no file that it writes can be longer than ``file_bytes``."""
    __tracebackhide__ = True
    return _run(
        AFINA, args, file_bytes=file_bytes, env=env or {}, cwd=cwd, timeout_seconds=timeout_seconds, check=check
    )


def ranks(
    script: Path,
    *args: str | os.PathLike[str],
    nproc: int = 2,
    env: Mapping[str, str] | None = None,
    timeout_seconds: float = 300,
    check: bool = True,
) -> Finished:
    """``nproc`` processes of one thread that run a script, with the environment of torchrun's."""
    __tracebackhide__ = True
    with tempfile.TemporaryDirectory(prefix="afina-", ignore_cleanup_errors=True) as scratch:
        env = {**RANK_ENVIRONMENT, "TMPDIR": scratch, **(env or {})}
        return _run(os.fspath(script), args, ranks=nproc, env=env, timeout_seconds=timeout_seconds, check=check)
