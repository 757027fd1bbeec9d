"""Start the project's processes from a test, and end them with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
SHOWN_LINES = 60
RANK_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "WANDB_MODE": "offline"}
# torchrun needs a moment after SIGTERM to take its workers along.
GRACE_SECONDS = 20


@dataclass(frozen=True, slots=True)
class Finished:
    """A process that has ended. ``output`` is stdout and stderr as they came, interleaved."""

    command: tuple[str, ...]
    returncode: int
    output: str

    def tail(self, lines: int = SHOWN_LINES) -> str:
        return "\n".join(self.output.splitlines()[-lines:])


def run(
    command: Sequence[str | os.PathLike[str]],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    timeout_seconds: float = 300,
    check: bool = True,
) -> Finished:
    """Run ``command`` to its end, no process of it left behind.

    ``env`` is laid over the test's own environment. With ``check``, a non-zero exit fails the test and shows the last
    60 lines; a timeout always does.
    """
    __tracebackhide__ = True
    words = tuple(os.fspath(word) for word in command)
    # A file, not a pipe: a grandchild that outlives the command must not keep us reading.
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            words,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        ending = ""
        try:
            process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            ending = f"ran past {timeout_seconds} s"
        finally:
            stop_tree(process)
        log.seek(0)
        finished = Finished(words, process.returncode, log.read().decode(errors="replace"))
    return checked(finished, ending, check)


def checked(finished: Finished, ending: str, check: bool) -> Finished:
    """Return it; fail the test with its last lines at an ``ending`` (a timeout) or, with ``check``, a non-zero exit."""
    __tracebackhide__ = True
    if not ending and check and finished.returncode != 0:
        ending = f"exited {finished.returncode}"
    if ending:
        words = " ".join(finished.command)
        raise AssertionError(f"{ending}: {words}\n--- its last {SHOWN_LINES} lines\n{finished.tail()}")
    return finished


def stop_tree(process: subprocess.Popen[bytes], grace_seconds: float = GRACE_SECONDS) -> None:
    """End ``process`` and all below it: SIGTERM, ``grace_seconds``, SIGKILL.

    torchrun's workers lead their own sessions, so ending the process group alone would leave them.
    """
    if process.poll() is not None:
        return
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(grace_seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in below:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(below, timeout=5)


def torchrun(
    script_or_module: str | os.PathLike[str],
    *args: str | os.PathLike[str],
    nproc: int = 2,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    timeout_seconds: float = 300,
    check: bool = True,
) -> Finished:
    """``torchrun --standalone`` with ``nproc`` CPU workers of one thread each: a ``.py`` file, or a module's name.

    ``--standalone`` picks a free port itself, so tests can run side by side. What the workers put into the temporary
    folder goes with them.
    """
    target = os.fspath(script_or_module)
    with tempfile.TemporaryDirectory(prefix="afina-", ignore_cleanup_errors=True) as scratch:
        return run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"),
                *("--nproc-per-node", str(nproc)),
                *((target,) if target.endswith(".py") else ("-m", target)),
                *args,
            ],
            env={**RANK_ENVIRONMENT, "TMPDIR": scratch, **(env or {})},
            cwd=cwd,
            timeout_seconds=timeout_seconds,
            check=check,
        )


def afina(
    *args: str | os.PathLike[str],
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    timeout_seconds: float = 300,
    check: bool = True,
) -> Finished:
    """The command line as users have it: the ``afina`` script of this environment."""
    script = Path(sys.executable).with_name("afina")
    return run([script, *args], env=env, cwd=cwd, timeout_seconds=timeout_seconds, check=check)
