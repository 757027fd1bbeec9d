"""End Python code of somebody else's that does not end by itself: a chat template may loop for ever."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

LOOK_SECONDS = 0.5


class TimeLimitExceeded(Exception):
    """Raised inside the ``with`` block of :meth:`TimeLimit.limited`."""


class TimeLimit:
    """Bounds blocks of Python code, in any thread and one after the other, at a cost of microseconds each.

    A thread of its own looks every half second, and raises in the thread whose block has lasted too long. What waits
    inside a single call of C is not ended before that call.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._begun: dict[int, float] = {}  # by thread
        self._lock = threading.Lock()
        self._watcher: threading.Thread | None = None

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Raise :class:`TimeLimitExceeded` inside the block when it has lasted too long."""
        thread = threading.get_ident()
        if self._watcher is None or not self._watcher.is_alive():  # not there yet, or this process is a fork
            self._watcher = threading.Thread(target=self._watch, name="time limit", daemon=True)
            self._watcher.start()
        self._begun[thread] = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._begun.pop(thread, None)

    def _watch(self) -> None:
        while True:
            time.sleep(LOOK_SECONDS)
            now = time.monotonic()
            with self._lock:
                late = [thread for thread, begun in self._begun.items() if now - begun > self.seconds]
                for thread in late:
                    del self._begun[thread]
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(thread), ctypes.py_object(TimeLimitExceeded)
                    )
