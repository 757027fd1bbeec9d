"""What the program logs, as lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from trainer.tracking.logs import LineHandler, use_handler


@contextmanager
def logged_to(write: Callable[[str], object]) -> Iterator[None]:
    """Give each logged line to ``write``, as a terminal would show it."""
    before = use_handler(LineHandler(write))
    try:
        yield
    finally:
        use_handler(before)


@contextmanager
def logged_lines() -> Iterator[list[str]]:
    """Collect the lines that are logged inside. Unlike ``caplog`` it needs no propagation to the root logger."""
    lines: list[str] = []
    with logged_to(lines.append):
        yield lines
