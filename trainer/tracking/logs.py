"""Configure logging: plain lines for people, from rank 0.

Every module has ``logger = logging.getLogger(__name__)``: ``logger.info`` is a line for people, ``logger.warning`` one
with "warning: " in front. Rank 0 alone prints them, so no caller asks for its rank.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, TextIO

from trainer.redaction import redact

if TYPE_CHECKING:
    from rich.progress import Progress

LOGGERS = ("trainer", "launch")
MIN_COLUMNS = 20  # of a terminal; one that says 0 does not know
PREFIXES = {logging.WARNING: "warning: ", logging.ERROR: "error: "}


def configure_logging(*, rank: int = 0, stream: TextIO | None = None) -> None:
    """Print the records of this program's loggers as plain lines; a second call replaces the first.

    Args:
        rank: this process's; on all but 0 only errors are printed, behind ``[rank N]``.
        stream: where to; ``None``: ``sys.stdout``, as it is when a record comes.
    """
    use_handler(LineHandler(lambda text: print_line(text, stream), rank, stream=stream or sys.stdout))


class LineHandler(logging.Handler):
    """Pass each record on as the text that people read.

    Args:
        write: called with the text, without a newline at its end.
        rank: as in :func:`configure_logging`.
        stream: where the lines go, and a counter's bar may.
        bar: that is on the screen already; the lines go above it.
    """

    def __init__(
        self,
        write: Callable[[str], object],
        rank: int = 0,
        *,
        stream: TextIO | None = None,
        bar: Progress | None = None,
    ) -> None:
        super().__init__(logging.ERROR if rank else logging.INFO)
        self.stream, self.bar = stream, bar
        self._write = write
        self._rank = f"[rank {rank}] " if rank else ""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._write(self._rank + self.format(record))
        except Exception:
            self.handleError(record)

    def format(self, record: logging.LogRecord) -> str:
        """Return the message, with its level in front where that is a warning or an error."""
        text = redact(super().format(record))
        prefix = PREFIXES.get(record.levelno, "")
        return text if text.startswith(prefix) else prefix + text


def use_handler(handler: LineHandler | None) -> LineHandler | None:
    """Give every record of this program to one handler (none: to the root logger's) and return the one before."""
    before = None
    for logger in map(logging.getLogger, LOGGERS):
        for old in [h for h in logger.handlers if isinstance(h, LineHandler)]:
            before = old
            logger.removeHandler(old)
        if handler is not None:
            logger.addHandler(handler)
        logger.setLevel(logging.NOTSET if handler is None else handler.level)
        # A root handler (of whoever embeds this, or of a library's `basicConfig`) would print every line again.
        logger.propagate = handler is None
    return before


def current_handler() -> LineHandler | None:
    """Return the handler that has the records now."""
    return next((h for h in logging.getLogger(LOGGERS[0]).handlers if isinstance(h, LineHandler)), None)


def draws_bars(stream: TextIO) -> bool:
    """Return whether a stream is a terminal on which a line can be drawn again (TERM=dumb cannot)."""
    try:
        return stream.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")
    except ValueError:  # it was closed
        return False


def print_line(text: str, stream: TextIO | None = None) -> None:
    """Print to a stream (``None``: ``sys.stdout``), on a terminal wrapped at words. One that was closed, or whose
    reader has gone, never raises."""
    target = sys.stdout if stream is None else stream
    try:
        print(encodable(fitted(text, target), target), file=target, flush=True)
    except (OSError, ValueError):
        # `| head` has what it wanted, or the terminal was closed. What is being done was not.
        if stream is None:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)


def print_above(bar: Progress, text: str) -> None:
    """Print above a bar, neither marked up nor coloured."""
    bar.console.print(fitted(text, bar.console.file), markup=False, highlight=False, soft_wrap=True)


def fitted(text: str, stream: IO[str]) -> str:
    """Return the text as a terminal shows it best: long lines are wrapped at words. For a pipe it stays as it is."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError, AttributeError):
        return text
    is_told = "COLUMNS" in os.environ or columns < MIN_COLUMNS  # a pseudo-terminal that nobody has sized says 0
    return wrap_words(text, None if is_told else columns)


def wrap_words(text: str, width: int | None = None) -> str:
    """Wrap each line at words, those after the first further in; a word that is longer than a line stays whole.

    Args:
        text: any lines.
        width: in columns; ``None``: the terminal's.
    """
    columns = terminal_width() if width is None else width
    lines = text.split("\n")
    return "\n".join(line if len(line) <= columns else _wrap_line(line, columns) for line in lines)


def _wrap_line(line: str, width: int) -> str:
    indent = line[: len(line) - len(line.lstrip())]
    wrapped = textwrap.wrap(
        line.strip(),
        width,
        initial_indent=indent,
        subsequent_indent=f"{indent}  ",
        expand_tabs=False,
        replace_whitespace=False,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(wrapped)


def terminal_width() -> int:
    """Return the columns of the terminal: ``COLUMNS`` where it is set, 80 in a pipe."""
    return shutil.get_terminal_size((80, 24)).columns


def encodable(text: str, stream: TextIO) -> str:
    """Return the text with what the stream's encoding does not have replaced."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, errors="replace").decode(encoding)
