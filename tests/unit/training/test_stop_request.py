"""What stops a run: signals, the second Ctrl-C at once, and those that a shell ignores on purpose."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.errors import LAUNCHER_PIDS
from trainer.training import stop_request
from trainer.training.stop_request import StopRequest

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    # A background shell or nohup may have left some ignored.
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_asks_to_stop(number: signal.Signals) -> None:
    stop = StopRequest().install()
    assert not stop.wanted
    os.kill(os.getpid(), number)
    assert stop.wanted
    assert stop.name == number.name


def test_the_second_interrupt_means_now() -> None:
    stop = StopRequest().install()
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.wanted
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_second_sigterm_changes_nothing() -> None:
    stop = StopRequest().install()
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.name == "SIGTERM"


def test_what_nohup_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest().install()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.wanted


def test_a_file_in_the_run_folder_asks_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_request, "LOOK_SECONDS", 0.0)
    stop = StopRequest()
    stop.begin(tmp_path / "STOP")
    assert not stop.wanted
    (tmp_path / "STOP").touch()
    assert stop.wanted
    assert not (tmp_path / "STOP").exists(), "or the next start would stop at once"


def test_a_file_in_any_run_folder_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_request, "LOOK_SECONDS", 0.0)
    stop = StopRequest()
    stop.begin(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b").touch()
    assert stop.wanted
    assert not (tmp_path / "b").exists()


WITHOUT_LAUNCHER = """
import sys, time
from trainer.training import stop_request
stop_request.LOOK_SECONDS = 0.05
stop = stop_request.StopRequest().install()
if sys.argv[1] == "training":
    stop.begin()
print("ready", flush=True)
while not stop.wanted:
    time.sleep(0.01)
time.sleep(0.5)
print(stop.name)
"""


@pytest.mark.parametrize(("when", "said", "code"), [("starting", "", 143), ("training", "the launcher has died", 0)])
def test_a_run_does_not_outlive_its_launcher(when: str, said: str, code: int) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    environment = {**os.environ, LAUNCHER_PIDS: str(launcher.pid)}
    command = [sys.executable, "-c", WITHOUT_LAUNCHER, when]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    launcher.kill()
    launcher.wait()
    assert process.communicate(timeout=20)[0].strip() == said
    assert process.returncode == code
