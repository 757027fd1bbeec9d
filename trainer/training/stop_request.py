"""Remember a request to stop: the loop finishes the step, saves and leaves."""

from __future__ import annotations

import signal
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Set by SIGTERM or SIGUSR1. The loop shares it with all ranks in its own small all-reduce, so that all stop after
    the same step; torchrun sends SIGTERM twice, so a second one changes nothing."""

    def __init__(self) -> None:
        self.name: str | None = None

    def install(self) -> StopRequest:
        """Take over the two signals of this process (main thread only)."""
        for number in _SIGNALS:
            signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.name = signal.Signals(number).name

    @property
    def wanted(self) -> bool:
        """Whether a signal has come."""
        return self.name is not None
