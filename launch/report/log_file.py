"""Read a run's `log.txt`: its lives, what happened in them, the samples, what it says of its data and machine."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

MAX_EVENTS = 100  # of a run; a run that overflows at every step has nothing more to say
MAX_LIVES = 500
MAX_SAMPLES = 20  # of an evaluation
MAX_TEXT = 2000  # characters of a sample or of an event
INDENT = " " * 13  # of the further lines of a sample

_STAMPED = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:[+-]\d\d:\d\d|Z)) (.*)", re.DOTALL)
_STEP = re.compile(r"step (\d+)/(\d+)\b")
_FIRST_LINE = re.compile(r"data: [\d,]+ rows to train on")
_RESUMED = re.compile(r"run: .*, resumed after step (\d+)$")
_FIELD = re.compile(r"  (prompt|reference|answer)\s{2,}(.*)", re.DOTALL)
_FACTS = ("data: ", "tokens: ", "steps: ", "model: ", "packing: ", "kernels: ")
# What begins a line, and what kind of event that is; a warning is one too.
_KINDS = (
    ("finished ", "finished"),
    ("stopped early", "finished"),
    ("stopped on request", "stopped"),
    ("changed since the run was stopped", "note"),
    ("best ", "note"),
    ("warning: ", "warning"),
)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a run.

    Attributes:
        time: in seconds since 1970.
        step: that was logged last.
        kind: ``resumed``, ``stopped``, ``killed``, ``failed``, ``finished``, ``warning`` or ``note``.
        text: as the log has it.
    """

    time: float
    step: int | None
    kind: str
    text: str


@dataclass(slots=True)
class Life:
    """One process of a run, from its first line to its last; times in seconds since 1970."""

    begin: float
    end: float
    step: int | None = None
    is_ended: bool = False  # it has said so itself


@dataclass(slots=True)
class Sample:
    """A held-out row that was answered."""

    prompt: str = ""
    reference: str = ""
    answer: str = ""


@dataclass(slots=True)
class LogFile:
    """Hold what a log says.

    Attributes:
        lives: in the order of time.
        events: in the order of time, at most ``MAX_EVENTS``.
        samples: by the step of their evaluation, those of the first and of the last one; 0 is before training.
        facts: its last lines on data, tokens, steps, model, packing and kernels, by their first word.
        total_steps: that the run was to take.
    """

    lives: list[Life] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    samples: dict[int, list[Sample]] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    total_steps: int | None = None


def read_log(path: Path) -> LogFile:
    """Read a log; empty where there is none. Lines that are no line of ours are passed over."""
    reader = _Reader(LogFile())
    try:
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            for line in file:
                reader.read(line.rstrip("\n"))
    except OSError:
        return LogFile()
    return reader.log


class _Reader:
    def __init__(self, log: LogFile) -> None:
        self.log = log
        self._samples: list[Sample] = []
        self._current = Sample()
        self._field = ""
        self._has_begun = False  # behind "run: FOLDER": warnings before it are of the data

    def read(self, line: str) -> None:
        stamped = _STAMPED.match(line)
        text = stamped[2] if stamped else line
        time = _seconds(stamped[1]) if stamped else None
        if text.startswith("sample ") and text[7:].isdigit():
            if time is not None:
                self._samples = []
            self._field = ""
            self._current = Sample()
            if len(self._samples) < MAX_SAMPLES:
                self._samples.append(self._current)
        elif time is None:
            self._continue_sample(line)
        else:
            self._field = ""
            self._line(time, text)

    def _continue_sample(self, line: str) -> None:
        found = _FIELD.match(line)
        if found:
            self._field = found[1]
        if not self._samples or not self._field or not (found or line.startswith(INDENT) or not line.strip()):
            return
        sample, name = self._current, self._field
        so_far = f"{getattr(sample, name)}\n{line[len(INDENT) :]}" if not found else found[2]
        setattr(sample, name, so_far[:MAX_TEXT])

    def _line(self, time: float, text: str) -> None:
        log = self.log
        if _FIRST_LINE.match(text) or not log.lives:
            self._begin_life(time)
        life = log.lives[-1]
        life.end = max(life.end, time)
        name = next((fact for fact in _FACTS if text.startswith(fact)), None)
        if found := _STEP.match(text):
            life.step, log.total_steps = int(found[1]), int(found[2])
            self._keep_samples(life.step)
        elif name is not None:
            log.facts[name.strip(": ")] = text.removeprefix(name)
        elif text.startswith("run: "):
            self._has_begun = True
            if resumed := _RESUMED.match(text):
                life.step = int(resumed[1])
                self._add(time, "resumed", f"resumed after step {resumed[1]}")
        elif self._has_begun and (kind := next((k for start, k in _KINDS if text.startswith(start)), None)):
            life.is_ended |= kind in ("finished", "stopped")
            self._add(time, kind, text)
        elif "update skipped" in text:
            self._add(time, "warning", text)

    def _begin_life(self, time: float) -> None:
        lives = self.log.lives
        if lives and not lives[-1].is_ended:
            self._add(lives[-1].end, "killed", "ended without a word: killed or failed")
        if len(lives) < MAX_LIVES:
            lives.append(Life(time, time, lives[-1].step if lives else None))
        self._has_begun = False

    def _keep_samples(self, step: int) -> None:
        if not self._samples:
            return
        kept = self.log.samples
        for later in [key for key in kept if key != min(kept)]:
            del kept[later]
        kept[step] = self._samples
        self._samples = []

    def _add(self, time: float, kind: str, text: str) -> None:
        if len(self.log.events) < MAX_EVENTS:
            self.log.events.append(Event(time, self.log.lives[-1].step, kind, text[:MAX_TEXT]))


def _seconds(stamp: str) -> float | None:
    try:
        return datetime.fromisoformat(stamp).timestamp()
    except (ValueError, OverflowError):
        return None
