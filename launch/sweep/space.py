"""Read what a sweep varies: the axes that are typed and those of its config group, and how trials are chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import trainer.config
from trainer.config import TrainConfig
from trainer.config.messages import as_typed
from trainer.config.overrides import parse
from trainer.config.schema import LOWER_IS_BETTER
from trainer.config.sweep_axes import Axis, parse_axis
from trainer.errors import ConfigError

ALPHA, MULTIPLES = "method.alpha", "sweep.alpha_over_rank"


@dataclass(frozen=True)
class Space:
    """What a sweep varies.

    Attributes:
        overrides: of the trials, swept or not: those of the sweep's group, then what was typed; no key of `sweep`.
        config_file: what they are on top of.
        config: of one of the trials, with the sweep's own keys.
    """

    overrides: list[str]
    config_file: Path | None
    config: TrainConfig

    @cached_property
    def axes(self) -> list[Axis]:
        """Return what is swept, alpha as multiples of the rank at the end."""
        axes = {axis.key: axis for axis in map(parse_axis, self.overrides)}
        swept = [axis for axis in axes.values() if axis.is_swept]
        multiples = tuple(f"{multiple:g}" for multiple in self.config.sweep.alpha_over_rank)
        return [*swept, Axis(MULTIPLES, multiples)] if multiples else swept

    @property
    def metric(self) -> str:
        """Return what the trials are judged by, one by one: `sweep.metric`, `eval.best_metric`, else a loss."""
        config = self.config
        held_out = config.data.validation
        is_scored = "loss" in config.eval.metrics and (isinstance(held_out, str) or held_out > 0)
        return config.sweep.metric or config.eval.best_metric or ("eval_loss" if is_scored else "train_loss")

    @property
    def lower_is_better(self) -> bool:
        """Return whether the metric is a loss."""
        return self.metric in ("train_loss", *LOWER_IS_BETTER)

    def plain(self, values: Mapping[str, str]) -> list[str]:
        """Return the plain overrides of the trial that has these values of the axes."""
        overrides = {axis.key: f"{axis.key}={values.get(axis.key, *axis.values[:1])}" for axis in self._all_axes()}
        return self.with_alpha(list(overrides.values()), values.get(MULTIPLES))

    def with_alpha(self, overrides: list[str], multiple: str | None) -> list[str]:
        """Add alpha as a multiple of the rank that the overrides come to."""
        if multiple is None:
            return overrides
        rank = trainer.config.load(overrides, self.config_file).method.r
        if rank is None:
            reason = "multiplies method.r, and this method has none"
            raise ConfigError(MULTIPLES, value=multiple, reason=reason, hint=as_typed(MULTIPLES, []))
        return [*overrides, f"{ALPHA}={rank * float(multiple):g}"]

    def _all_axes(self) -> list[Axis]:
        return list({axis.key: axis for axis in map(parse_axis, self.overrides)}.values())


def read_space(typed: Sequence[str], config_file: Path | None = None) -> Space:
    """Read a sweep as typed: ``method.r=8,16``, ``sweep=rank_alpha``, ``sweep.sampler=tpe``.

    Raises:
        ConfigError: nothing is swept, or what is typed cannot be used.
    """
    own: list[str] = []
    others: list[str] = []
    for text in typed:
        override = parse(text)
        is_own = override.key_or_group == "sweep" or override.key_or_group.startswith("sweep.")
        if is_own and override.is_sweep_override():
            raise ConfigError(
                text, reason="a sweep's own key has one value", hint="several sweeps are several commands"
            )
        (own if is_own else others).append(text)
    first = [f"{axis.key}={_first_value(axis)}" for axis in map(parse_axis, others)]
    config = trainer.config.load([*first, *own], config_file)
    typed_keys = {parse(text).key_or_group for text in others}
    added = [f"{key}={text}" for key, text in config.sweep.axes.items() if key not in typed_keys]
    space = Space([*added, *others], config_file, config)
    if not space.axes:
        hint = "separate them by commas: method.r=8,16,32; or sweep=rank_alpha"
        raise ConfigError("sweep", reason="no key has several values", hint=hint)
    if space.config.sweep.alpha_over_rank and any(axis.key == ALPHA for axis in space.axes):
        reason = "gives method.alpha, which is swept itself"
        raise ConfigError(MULTIPLES, value=config.sweep.alpha_over_rank, reason=reason, hint=as_typed(MULTIPLES, []))
    return space


def _first_value(axis: Axis) -> str:
    return axis.interval.examples()[0] if axis.interval is not None else axis.values[0]
