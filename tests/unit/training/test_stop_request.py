"""What stops a run: signals, the second Ctrl-C at once, and those that a shell ignores on purpose."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

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
