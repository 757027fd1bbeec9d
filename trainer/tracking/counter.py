"""Count what a long stage has done, for people: a bar on a terminal, plain lines in a pipe or a job's log."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TextIO, TypeVar

from trainer.tracking.logs import LineHandler, current_handler, draws_bars, print_above, use_handler
from trainer.tracking.terminal import clock as minutes

if TYPE_CHECKING:
    from rich.progress import Progress

EVERY_SECONDS = 30.0  # a plain line
LOOK_SECONDS = 1.0  # whether one is due, where the stage itself has nothing to say

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
_said: dict[str, float] = {}  # when the last plain line of a stage was


class ProgressCounter:
    """Show how far a long stage is, while the context is open. Only where lines are shown (rank 0); no collective.

    On a terminal: a bar, gone at the end. Elsewhere a line at the start and every 30 s.

    Args:
        what: verb and object, such as ``evaluating``.
        total: of all ranks; ``None``: not known (yet).
        unit: what is counted, where ``what`` does not say it.
        recurs: it comes again and again, as evaluations do: its start is a line once in 30 s, too.
        now: seconds of a clock.
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        unit: str = "",
        *,
        recurs: bool = False,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what, self.total, self.unit, self.recurs, self.done = what, total, unit, recurs, 0
        self._now, self._begin = now, now()
        self._shown: _Lines | _Bar | None = None

    def __enter__(self) -> ProgressCounter:
        handler = current_handler()
        if handler is None or not logger.isEnabledFor(logging.INFO):
            return self
        if handler.bar is not None:
            self._shown = _Bar(self, handler.bar)
        elif handler.stream is not None and draws_bars(handler.stream):
            self._shown = _OwnBar(self, handler.stream, handler)
        else:
            self._shown = _Lines(self, self._now)
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown is not None:
            self._shown.close()
            self._shown = None

    def advance(self, count: int = 1) -> None:
        """Count what has been done since."""
        self.done += count
        if self._shown is not None:
            self._shown.update()

    def over(self, items: Iterable[Item], total: int | None = None) -> Iterator[Item]:
        """Yield the items and count each when the next is asked for; ``total``: where it was not known."""
        self.total = self.total if total is None else total
        for item in items:
            yield item
            self.advance()

    @property
    def seconds(self) -> float:
        """Return the seconds since the start."""
        return self._now() - self._begin

    @property
    def count(self) -> str:
        """Return how far it is, such as ``96/256``; empty where nothing is counted."""
        unit = f" {self.unit}" if self.unit else ""
        if self.total is not None:
            return f"{self.done:,}/{self.total:,}{unit}"
        return f"{self.done:,}{unit}" if self.done else ""


@contextmanager
def loading_libraries() -> Iterator[None]:
    """Say that libraries are loaded inside, which takes ten seconds, unless they have been before."""
    if "torch" in sys.modules:
        yield
        return
    with ProgressCounter("loading libraries"):
        yield


class _Lines:
    """Say how far a stage is in plain lines; a thread looks whether one is due, for a stage may hang in one call."""

    def __init__(self, counter: ProgressCounter, now: Callable[[], float]) -> None:
        self._counter, self._now = counter, now
        self._lock, self._done = threading.Lock(), threading.Event()
        if not counter.recurs:
            _said.pop(counter.what, None)
        self.update()
        self._thread = threading.Thread(target=self._look, name="counter", daemon=True)
        self._thread.start()

    def update(self) -> None:
        with self._lock:
            counter, now = self._counter, self._now()
            if now - _said.get(counter.what, float("-inf")) < EVERY_SECONDS:
                return
            _said[counter.what] = now
            took = f"({minutes(counter.seconds)})" if counter.seconds >= 1 else ""
            logger.info(" ".join(filter(None, (counter.what, counter.count, took))))

    def close(self) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(LOOK_SECONDS):
            self.update()


class _Bar:
    """One more line of a bar that is on the screen already, in the place of the others."""

    def __init__(self, counter: ProgressCounter, bar: Progress) -> None:
        self._counter, self._bar = counter, bar
        self._hidden = [task.id for task in bar.tasks if task.visible]
        for task in self._hidden:
            bar.update(task, visible=False)
        self._task = bar.add_task(counter.what, total=counter.total, count=counter.count, note="")

    def update(self) -> None:
        counter = self._counter
        with suppress(OSError):
            self._bar.update(self._task, completed=counter.done, total=counter.total, count=counter.count)

    def close(self) -> None:
        with suppress(OSError):
            self._bar.remove_task(self._task)
            for task in self._hidden:
                self._bar.update(task, visible=True)


class _OwnBar(_Bar):
    """A bar of its own, which lets what is logged pass above it."""

    def __init__(self, counter: ProgressCounter, stream: TextIO, before: LineHandler) -> None:
        bar = _new_bar(stream)
        super().__init__(counter, bar)
        self._handler = LineHandler(lambda text: print_above(bar, text), stream=stream, bar=bar)
        self._before = before
        use_handler(self._handler)
        with suppress(OSError):
            bar.start()

    def close(self) -> None:
        with suppress(OSError):
            self._bar.stop()
        if current_handler() is self._handler:
            use_handler(self._before)


def _new_bar(stream: TextIO) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column

    console = Console(file=stream)
    place = Column(no_wrap=True, overflow="ellipsis", max_width=max(12, console.width - 50))  # the rest, on one line
    columns = (
        TextColumn("{task.description}", markup=False, table_column=place),
        BarColumn(20),
        TextColumn("{task.fields[count]}", markup=False),
        TimeElapsedColumn(),
    )
    return Progress(
        *columns,
        console=console,
        refresh_per_second=4,
        redirect_stdout=sys.stdout.isatty(),  # else it is the reader's of the pipe
        transient=True,
    )
