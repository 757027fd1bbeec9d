"""``trainer.serve_trials``: a fork a job, each a process of its own. ``trainer.train`` is stood in for.

Real runs are in tests/end_to_end/test_sweep_verb.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.processes import ROOT

TRAIN = """
import os, signal, sys, time
def load_libraries():
    pass
def main(arguments):
    print("argv", sys.argv[1:], "variable", os.environ.get("GIVEN"), os.environ.get("UNSET"), flush=True)
    handler = signal.getsignal(signal.SIGTERM)
    if arguments[0] == "raise":
        raise RuntimeError("boom")
    if arguments[0] == "sleep":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        time.sleep(60)
    if arguments[0] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if arguments[0] == "default":
        return int(handler == signal.SIG_DFL) + 10
    if arguments[0] == "launchers":
        return int(os.environ["AFINA_LAUNCHER_PIDS"] == f"7,{os.getppid()}") + 20
    if arguments[0] == "group":
        return int(os.getpgrp() == os.getpid()) + 30
    return int(arguments[0])
"""


class Server:
    def __init__(self, folder: Path) -> None:
        ours, theirs = os.pipe()
        environment = {**os.environ, "UNSET": "there", "AFINA_LAUNCHER_PIDS": "7"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trainer.serve_trials", str(theirs)],
            cwd=folder,
            env={**environment, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
            stdin=subprocess.PIPE,
            pass_fds=[theirs],
        )
        os.close(theirs)
        self.answers = open(ours)  # noqa: SIM115 (as long as the server)
        self.output = folder / "output.txt"

    def send(self, number: int, *arguments: str) -> None:
        assert self.process.stdin is not None
        job = {"id": number, "arguments": arguments, "output": str(self.output)}
        job["environment"] = {"GIVEN": "yes", "UNSET": None}
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        return json.loads(self.answers.readline() or "{}")

    def code(self, number: int, *arguments: str) -> int:
        self.send(number, *arguments)
        assert self.answer()["id"] == number
        return self.answer()["code"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    package = folder / "trainer"
    package.mkdir()
    (package / "__init__.py").write_text(f"__path__.append({str(ROOT / 'trainer')!r})\n")
    (package / "train.py").write_text(TRAIN)
    made = Server(folder)
    assert made.answer() == {"ready": True, "reason": None}
    yield made
    made.process.kill()
    made.process.wait()


def test_each_job_ends_with_its_own_code(server: Server) -> None:
    assert server.code(1, "0", "method.r=4") == 0
    assert "argv ['0', 'method.r=4'] variable yes None" in server.output.read_text()
    assert server.code(2, "5") == 5
    assert server.code(3, "raise") == 1
    assert "RuntimeError: boom" in server.output.read_text()
    assert server.code(4, "kill") == -signal.SIGKILL
    assert server.code(5, "0") == 0, "a crash is its own"


def test_a_run_is_as_one_that_was_started_by_itself(server: Server) -> None:
    assert server.code(1, "default") == 11, "the server ignores signals, its runs do not"
    assert server.code(2, "launchers") == 21, "it sees that its launcher or its server has died"
    assert server.code(3, "group") == 31, "a Ctrl-C reaches it through the launcher alone"


def test_several_run_at_once_and_are_stopped_one_by_one(server: Server) -> None:
    server.send(1, "sleep")
    server.send(2, "sleep")
    pids = {answer["id"]: answer["pid"] for answer in (server.answer(), server.answer())}
    server.process.terminate()  # as a scheduler that signals all processes of a job
    time.sleep(1.0)
    os.kill(pids[2], signal.SIGTERM)
    assert server.answer() == {"id": 2, "code": 75}
    os.kill(pids[1], signal.SIGTERM)
    assert server.answer() == {"id": 1, "code": 75}


def test_it_leaves_with_its_last_run_when_the_launcher_has_gone(server: Server) -> None:
    server.send(1, "sleep")
    pid = server.answer()["pid"]
    assert server.process.stdin is not None
    server.process.stdin.close()
    time.sleep(0.5)
    assert server.process.poll() is None
    os.kill(pid, signal.SIGTERM)
    assert server.process.wait(30) == 0
