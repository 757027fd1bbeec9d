"""Read what a sweep varies, in Hydra's grammar: lists, ranges and intervals of values."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from hydra.core.override_parser.types import IntervalSweep, Override

from trainer.config.messages import config_error, in_shell, listing
from trainer.config.overrides import check_name, parse
from trainer.config.suggestions import config_fields, groups
from trainer.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Interval:
    """All values between two ends: ``interval(low, high)``, ``tag(log, interval(low, high))``.

    Attributes:
        low, high: the ends, both included.
        is_log: drawn evenly over magnitudes.
        is_whole: whole numbers only.
    """

    low: float
    high: float
    is_log: bool
    is_whole: bool

    def __str__(self) -> str:
        """Return it in words."""
        return f"{self.low:g} to {self.high:g}{', evenly over magnitudes' if self.is_log else ''}"

    def text(self, value: float) -> str:
        """Return a value as it is typed: four digits say all that a trial can tell."""
        if self.is_whole:
            return str(int(value))
        return repr(min(max(float(f"{value:.3e}"), self.low), self.high))

    def examples(self) -> list[str]:
        """Return both ends and the middle."""
        middle = math.sqrt(self.low * self.high) if self.is_log else (self.low + self.high) / 2
        return [self.text(value) for value in (self.low, middle, self.high)]


@dataclass(frozen=True, slots=True)
class Axis:
    """One key and what it is set to: one value, several, or an interval.

    Attributes:
        key: as typed, such as ``method.r``, or a group.
        values: as typed; empty for an interval.
        interval: of an interval.
    """

    key: str
    values: tuple[str, ...]
    interval: Interval | None = None

    @property
    def is_swept(self) -> bool:
        """Return whether there is anything to choose from."""
        return len(self.values) != 1


def parse_axis(text: str) -> Axis:
    """Parse one override, swept or not.

    Raises:
        ConfigError: there is no such key, or the sweep has no values, some twice, or a pattern in their place.
    """
    override = parse(text)
    check_name(override.key_or_group, override)
    key = override.get_key_element()
    if not override.is_sweep_override():
        return Axis(key, (override.get_value_element_as_str(),))
    if override.is_interval_sweep():
        return Axis(key, (), _interval(text, override))
    if "glob(" in override.get_value_string():
        every = groups().get(override.key_or_group, ("A", "B"))
        raise config_error(text, ..., "a pattern is not a list of values", f"list them: {key}={','.join(every)}")
    values = tuple(override.sweep_string_iterator())
    if not values:
        raise config_error(text, ..., "the sweep has no values", f"list them: {key}=A,B")
    repeated = sorted({f"{key}={value}" for value in values if values.count(value) > 1})
    if repeated:
        raise config_error(text, ..., f"the sweep gives {listing(repeated)} twice", "give each value once")
    return Axis(key, values)


def _interval(text: str, override: Override) -> Interval:
    key, value = override.key_or_group, override.value()
    assert isinstance(value, IntervalSweep)
    low, high = float(value.start or 0), float(value.end or 0)
    if key not in config_fields() or config_fields()[key].base not in (int, float):
        raise config_error(text, ..., f"{key} is not a number, and an interval holds numbers", f"list them: {key}=A,B")
    is_log = "log" in value.tags
    if unknown := sorted(value.tags - {"log"}):
        raise config_error(
            text,
            ...,
            f"the tag {listing(unknown)} means nothing here",
            in_shell(key, f"tag(log,interval({low:g},{high:g}))"),
        )
    if not low < high:
        raise config_error(text, ..., "an interval goes from low to high", in_shell(key, f"interval({high:g},{low:g})"))
    if is_log and low <= 0:
        raise config_error(
            text, ..., "magnitudes begin above 0", in_shell(key, f"tag(log,interval({high / 1000:g},{high:g}))")
        )
    return Interval(low, high, is_log, config_fields()[key].base is int)


def expand_sweep(overrides: Sequence[str], seed: int = 0) -> list[list[str]]:
    """Expand a sweep into every combination, as lists of plain overrides; the last override typed varies fastest.

    Args:
        overrides: as typed; of two for a key the last one counts, in the place of the first.
        seed: of ``shuffle(…)``.

    Raises:
        ConfigError: a sweep that cannot be enumerated (``interval``, ``glob``), or that has no values.
    """
    with _seeded(seed):
        axes = {axis.key: axis for axis in map(parse_axis, overrides)}
    for axis in axes.values():
        if axis.interval is not None:
            raise _endless(axis, axis.interval)
    combinations = itertools.product(*([f"{axis.key}={value}" for value in axis.values] for axis in axes.values()))
    return [list(combination) for combination in combinations]


def _endless(axis: Axis, interval: Interval) -> ConfigError:
    hint = f"sweep.sampler=random draws from it; a grid is a list: {axis.key}={','.join(interval.examples())}"
    return config_error(axis.key, str(interval), "an interval has no end of values", hint)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Let Hydra's own shuffle give the same order each time: it asks the interpreter's one generator."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
