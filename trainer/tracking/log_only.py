"""Write what one of several runs of a process has to say into its `log.txt`: the terminal is theirs together."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.tracking.log_file import LogFile
from trainer.tracking.logs import LineHandler, current_handler, use_handler
from trainer.tracking.terminal import Eta, sample_text, step_line


class LogOnly:
    """What a :class:`Terminal` is to a run by itself; nothing is shown.

    Args:
        folder: the run folder.
        total_steps: of the whole run.
    """

    def __init__(self, folder: Path, *, total_steps: int) -> None:
        self._total_steps, self._eta, self._log = total_steps, Eta(total_steps), LogFile(folder)

    def step(self, record: Mapping[str, Any]) -> None:
        """Write the line of a step."""
        self._log.write(step_line(record, self._total_steps, self._eta.seconds(record["step"])))

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write answers: mappings with ``prompt``, ``reference`` and ``answer``."""
        if rows:
            self._log.write("\n".join(sample_text(number, row) for number, row in enumerate(rows, start=1)))

    def stop_bar(self) -> None:
        """Have no bar."""

    def close(self) -> None:
        """Have nothing to give back."""


@contextmanager
def into_log(folder: Path, name: str) -> Iterator[None]:
    """Write this program's log records into a run's `log.txt` inside the ``with`` block; warnings and errors are shown,
    too, with the run's name in front.

    Args:
        folder: the run folder.
        name: of the run, for people.
    """
    shown, log = current_handler(), LogFile(folder)

    class Handler(LineHandler):
        def emit(self, record: logging.LogRecord) -> None:
            log.write(self.format(record))
            if record.levelno >= logging.WARNING and shown is not None:
                told = logging.makeLogRecord({**vars(record), "msg": f"{name}: {record.getMessage()}", "args": None})
                shown.emit(told)

    if shown is None or shown.level > logging.INFO:  # not rank 0's
        yield
        return
    use_handler(Handler(lambda text: None, stream=shown.stream, bar=shown.bar))
    try:
        yield
    finally:
        use_handler(shown)
