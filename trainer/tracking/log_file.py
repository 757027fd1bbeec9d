"""Write the lines of a run into its `log.txt`, each with the time."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

LOG_FILE = "log.txt"


class LogFile:
    """The `log.txt` of a run. A full disk never raises: it is reported where it costs something, at checkpoints and
    metrics.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOG_FILE

    def write(self, text: str) -> None:
        """Add a line, or several."""
        stamp = datetime.now().astimezone().isoformat(timespec="seconds")
        try:
            with open(self.path, "a", encoding="utf-8", errors="replace") as file:
                file.write(f"{stamp} {text}\n")
        except OSError:
            return
