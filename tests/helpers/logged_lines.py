"""Collect what the program logs."""

from __future__ import annotations

import logging


class LoggedLines(logging.Handler):
    """The lines that ``trainer`` and ``launch`` log from now on, warnings with ``warning: `` in front."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        for name in ("trainer", "launch"):
            logging.getLogger(name).addHandler(self)
            logging.getLogger(name).setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno == logging.WARNING else ""
        self.lines.append(prefix + record.getMessage())
