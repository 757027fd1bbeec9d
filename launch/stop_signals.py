"""Take over the signals that ask to stop while jobs run, and pass the first one on to each of them."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class Stoppable(Protocol):
    """A job that runs: it can be asked to save and leave, or be killed."""

    def stop(self, number: int) -> None: ...

    def kill(self) -> None: ...


class StopSignals:
    """What has been received since the signals were taken over, and the jobs that are told.

    Attributes:
        received: numbers of signals, in their order.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._jobs: dict[Stoppable, threading.Lock] = {}

    @contextmanager
    def told_to(self, job: Stoppable) -> Iterator[None]:
        """Pass signals on to a job inside the ``with`` block; one that came before is passed on at once."""
        self._jobs[job] = threading.Lock()
        try:
            if self.received:
                self._stop(job)
            yield
        finally:
            del self._jobs[job]

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Ask every job to stop, once: torchrun's agent takes a second signal while it waits for its workers as a
        reason to leave them behind. A Ctrl-C after that kills them."""
        self.received.append(number)
        jobs = list(self._jobs)
        if len(self.received) == 1 and jobs:
            print("stopping: waiting for the run to save (Ctrl-C kills it)", file=sys.stderr)
        for job in jobs:
            if len(self.received) == 1:
                self._stop(job)
            elif number == signal.SIGINT:
                job.kill()

    def _stop(self, job: Stoppable) -> None:
        told = self._jobs.get(job)
        # a thread that has just begun the job and the handler may both come here; nothing waits in a handler
        if told is not None and told.acquire(blocking=False):
            job.stop(_gentle(self.received[0]))


_active: StopSignals | None = None


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Take over the signals of this process inside the ``with`` block (main thread only). Inside another such block,
    and in its threads, yield what that one has received."""
    global _active
    if _active is not None:
        yield _active
        return
    signals = StopSignals()
    previous = {number: signal.signal(number, signals.handle) for number in STOP_SIGNALS}
    _active = signals
    try:
        yield signals
    finally:
        _active = None
        for number, handler in previous.items():
            signal.signal(number, handler)


def _gentle(number: int) -> int:
    """The signal that asks a run to save and leave, by which torchrun's agent waits for its workers, too."""
    return number if number == signal.SIGUSR1 else signal.SIGTERM
