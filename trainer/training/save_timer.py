"""Tell when ``checkpoint.every_minutes`` have passed."""

from __future__ import annotations

import time


class SaveTimer:
    """Counts from its making, or from the last restart.

    Args:
        minutes: until a checkpoint is due; 0: never.
    """

    def __init__(self, minutes: float) -> None:
        self._seconds = 60 * minutes
        self.restart()

    def restart(self) -> None:
        """Count from now."""
        self._begin = time.monotonic()

    def is_due(self) -> bool:
        """Return whether the minutes have passed."""
        return 0 < self._seconds <= time.monotonic() - self._begin
