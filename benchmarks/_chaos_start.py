"""Start the two ranks of a training that will be killed, and see that all of its processes end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import psutil

HERE = Path(__file__).resolve().parent
RANK_COUNT = 2
LIMIT_SECONDS = 300.0  # of one start
IMPORT_SECONDS = 10.0
PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h
ORPHAN_SECONDS = 20.0  # that ranks have whose torchrun was killed


@dataclass(frozen=True)
class Chaos:
    """One end to come: at which point, from which step on, of which ranks; ``after`` seconds for ``any moment``; what
    happens there (kill, stop, raise)."""

    point: str = "none"
    step: int = 0
    ranks: str = ""
    after: float = 0.0
    action: str = "kill"


class Starter:
    """Starts trainings one after the other, each tenth by torchrun and the others as forks of this process.

    Args:
        folder: where they work, and their output goes (``log.txt``).
        term_seconds: that a survivor has to end by itself; torchrun gives 30.
    """

    def __init__(self, folder: Path, term_seconds: float = 30.0) -> None:
        import deepspeed  # noqa: F401  before any fork
        import peft  # noqa: F401

        import trainer.train  # noqa: F401

        folder.mkdir(parents=True, exist_ok=True)
        adopt_orphans()
        self.folder, self.term_seconds = folder, term_seconds
        self._count = 0

    def start(self, keys: list[str], chaos: Chaos) -> int:
        """Train once with these overrides; return 0 where it came to its end.

        Raises:
            SystemExit: it ended otherwise than it was made to, or left a process.
        """
        self._count += 1
        by_torchrun = chaos.point == "import" or self._count % 10 == 0
        os.environ["AFINA_CHAOS"] = f"{chaos.point}:{chaos.step}:{chaos.ranks}:{chaos.action}"
        with (self.folder / "log.txt").open("ab") as log:
            code = self._torchrun(keys, chaos, log.fileno()) if by_torchrun else self._fork(keys, chaos, log.fileno())
        limit = time.monotonic() + ORPHAN_SECONDS
        while left := living_children():
            if time.monotonic() > limit:
                break
            time.sleep(0.1)
        if left or (code and chaos.point == "none"):
            text = (self.folder / "log.txt").read_text(errors="replace")[-6000:]
            raise SystemExit(f"{keys}, {chaos}: code {code}, processes left: {left}\n{text}")
        return code

    def run_one(self, keys: list[str], log: int) -> int:
        """Train in one process with these overrides; return its exit code."""
        pid = os.fork()
        if not pid:
            be_rank(0, 0, keys, log, self.folder, world_size=1)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def _torchrun(self, keys: list[str], chaos: Chaos, log: int) -> int:
        """Start the ranks as a user does."""
        command = [sys.executable, "-m", "trainer.torchrun", f"--nproc-per-node={RANK_COUNT}", "--standalone"]
        command += ["--local-addr=127.0.0.1", str(HERE / "_chaos_rank.py"), *keys]
        environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, env=environment)
        if chaos.point == "any moment":
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(chaos.after + IMPORT_SECONDS)
            ranks = psutil.Process(process.pid).children() if process.poll() is None else []
            if chaos.ranks == "0" and ranks:
                process.kill()  # torchrun itself, whose ranks must see that, save and end
            else:
                for rank in ranks if chaos.ranks == "0,1" else ranks[:1]:
                    rank.kill()
        return process.wait(LIMIT_SECONDS)

    def _fork(self, keys: list[str], chaos: Chaos, log: int) -> int:
        """Start the ranks as forks, and do what torchrun's agent does: one that fails ends the other."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ranks: dict[int, int] = {}
        for rank in range(RANK_COUNT):
            pid = os.fork()
            if not pid:
                be_rank(rank, port, keys, log, self.folder)
            ranks[pid] = rank
        return wait(ranks, chaos, self.term_seconds)


def wait(ranks: dict[int, int], chaos: Chaos, term_seconds: float) -> int:
    """Wait for all ranks (by process), killing some when it is time; return the code that says most."""
    begin = time.monotonic()
    kill_at = begin + chaos.after if chaos.point == "any moment" else float("inf")
    limit, is_told = begin + LIMIT_SECONDS, False
    codes: dict[int, int] = {}
    while len(codes) < len(ranks):
        time.sleep(0.02)
        for pid in [pid for pid in ranks if pid not in codes]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
        alive, now = [pid for pid in ranks if pid not in codes], time.monotonic()
        if now > kill_at:
            kill_at = float("inf")
            send(signal.SIGKILL, [pid for pid in alive if str(ranks[pid]) in chaos.ranks.split(",")])
        elif any(codes.values()) and not is_told:
            is_told, limit = True, now + term_seconds
            send(signal.SIGTERM, alive)
        elif now > limit:
            send(signal.SIGKILL, alive)
    return max(abs(code) for code in codes.values())


def be_rank(rank: int, port: int, keys: list[str], log: int, folder: Path, world_size: int = RANK_COUNT) -> NoReturn:
    """Be one rank of the training: this process is a fork, and ends here."""
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if world_size > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_PORT=str(port))
            os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
        from benchmarks._chaos_rank import main

        code = main(keys)
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        if not isinstance(error, SystemExit):
            import traceback

            traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def send(number: signal.Signals, processes: list[int]) -> None:
    """Send a signal to processes that may be gone."""
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def adopt_orphans() -> None:
    """Become the parent of each process below this one whose own parent dies (Linux): what is left over is seen."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def living_children() -> list[psutil.Process]:
    """Return the processes below this one that run; those that have ended are waited for."""
    left = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error, ChildProcessError):
            if process.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(process.pid, os.WNOHANG)
            else:
                left.append(process)
    return left
