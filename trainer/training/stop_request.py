"""Remember a request to stop: the loop finishes the step, saves and leaves."""

from __future__ import annotations

import signal
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class StopRequested(Exception):
    """Raised on every rank between two batches of an evaluation: what is being scored can be scored again."""


class StopRequest:
    """Set by SIGTERM, SIGUSR1, SIGINT (Ctrl-C) or SIGHUP (a closed terminal).

    The loop shares it with all ranks in its own small all-reduce, so that all stop after the same step. torchrun sends
    SIGTERM twice, so a second one changes nothing; a second Ctrl-C means now.
    """

    def __init__(self) -> None:
        self.name: str | None = None

    def install(self) -> StopRequest:
        """Take over the signals of this process (main thread only)."""
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup and background shells ignore some on purpose
                signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.name == "SIGINT":
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    @property
    def wanted(self) -> bool:
        """Whether a signal has come."""
        return self.name is not None
