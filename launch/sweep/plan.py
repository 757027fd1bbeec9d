"""Plan the trials of a sweep: their folders and names, their configs composed and checked; nothing is started."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import trainer.config
from launch import torchrun
from launch.sweep import report as ranking
from launch.sweep.sampler import DEFAULT_TRIALS, Values, draw_all
from launch.sweep.space import ALPHA, MULTIPLES, Space, read_space
from launch.trials import Trial, default_run_name, digest_name
from trainer.config import TrainConfig
from trainer.errors import ConfigError

# a folder's name may have 255 bytes; the rest is left to the files' own names and to whoever must read it
MAX_NAME_LENGTH = 80


def plan_sweep(typed: Sequence[str], config_file: Path | None = None) -> tuple[Path, list[Trial]]:
    """Plan all trials of a sweep.

    Returns:
        The sweep's folder and its trials, in the order in which Hydra expands them, or in which they are drawn.

    Raises:
        ConfigError: no key has several values, a combination cannot be used, or trials depend on the results of others
            (:func:`why_not_planned`).
    """
    space = read_space(typed, config_file)
    if (refused := why_not_planned(space)) is not None:
        raise refused
    return plan(space)


def why_not_planned(space: Space) -> ConfigError | None:
    """Return why the trials of a sweep cannot be trained apart from each other, as the elements of a Slurm array are;
    ``None`` where they can."""
    settings = space.config.sweep
    if settings.sampler == "tpe":
        reason = "each trial is chosen by the results of those before it, so they cannot be planned"
        return ConfigError("sweep.sampler", value="tpe", reason=reason, hint="sweep.sampler=random")
    if settings.early_stopping != "none":
        reason = "which trials go on is decided by the results of all, so they cannot be planned"
        hint = "sweep.early_stopping=none"
        return ConfigError("sweep.early_stopping", value=settings.early_stopping, reason=reason, hint=hint)
    return None


def plan(space: Space) -> tuple[Path, list[Trial]]:
    """Plan a sweep whose trials do not depend on results; returns as :func:`plan_sweep`."""
    if space.config.sweep.sampler == "random":
        placed = Placement(space)
        return placed.folder, placed.trials(draw_all(space))
    combinations = _drop_duplicates(_grid(space))
    configs = [trainer.config.load(combination, space.config_file) for combination in combinations]
    varied = _varied_values(combinations)
    names = _trial_names(varied) if varied[0] else [default_run_name(configs[0])]
    # a digest of what is trained, so that the same sweep finds its folder again; with the trials' names, since sweeps
    # over micro sizes or ZeRO stages all train the same
    parts = [f"{default_run_name(c)} {name}" for c, name in zip(configs, names, strict=True)]
    folder = Path(configs[0].run.dir) / (_given_name(combinations[0], configs[0]) or digest_name(parts, "sweep-"))
    trials = zip(names, varied, combinations, configs, strict=True)
    return folder, [_place(folder, *trial) for trial in trials]


class Placement:
    """Gives a place to trials whose values are chosen one by one: it depends on no other trial.

    Args:
        space: what is varied.
    """

    def __init__(self, space: Space) -> None:
        self._space = space
        config = space.config
        axes = sorted(repr(axis) for axis in space.axes)
        name = digest_name([default_run_name(config), *axes, f"{config.sweep.sampler} {config.sweep.seed}"], "sweep-")
        self.folder = Path(config.run.dir) / (_given_name(space.overrides, config) or name)
        self.count = config.sweep.trials or DEFAULT_TRIALS
        # values that differ only in signs a folder's name cannot hold
        parts = [[_name_part(axis.key, value) for value in axis.values] for axis in space.axes]
        self._alike = any(len(set(part)) < len(part) for part in parts)

    def trials(self, drawn: Sequence[Values]) -> list[Trial]:
        """Build trials with these values of the axes."""
        combinations = [self._space.plain(values) for values in drawn]
        keys = [ALPHA if axis.key == MULTIPLES else axis.key for axis in self._space.axes]
        varied = [_in_order({key: _override_values(c)[key] for key in keys}) for c in combinations]
        labels = ranking.short_labels(list(varied[0])) if varied else {}
        built = []
        for values, combination in zip(varied, combinations, strict=True):
            config = trainer.config.load(combination, self._space.config_file)
            name = _trial_name(values, labels)
            name = digest_name([str(values)], f"{name}-") if self._alike else name
            built.append(_place(self.folder, name, values, combination, config))
        return built


def _grid(space: Space) -> list[list[str]]:
    combinations = trainer.config.expand_sweep(space.overrides, space.config.sweep.seed)
    multiples = [f"{multiple:g}" for multiple in space.config.sweep.alpha_over_rank]
    if not multiples:
        return combinations
    return [space.with_alpha(combination, multiple) for combination in combinations for multiple in multiples]


def _given_name(overrides: Sequence[str], config: TrainConfig) -> str | None:
    """Return the sweep's name, if one is given here: a config file of an old run holds that run's name."""
    return config.run.name if "run.name" in _override_values(overrides) else None


def _place(folder: Path, name: str, values: dict[str, str], combination: list[str], config: TrainConfig) -> Trial:
    where = {"run.dir": str(folder), "run.name": name, "log.group": config.log.group or folder.name}
    # not composed again: at 0.2 s a config a wide sweep would keep its user waiting
    placed = replace(
        config,
        run=replace(config.run, dir=where["run.dir"], name=name),
        log=replace(config.log, group=where["log.group"]),
    )
    overrides = [*combination, *(f"{key}={torchrun.quote(value)}" for key, value in where.items())]
    return Trial(name, overrides, values, placed)


def _drop_duplicates(combinations: list[list[str]]) -> list[list[str]]:
    """Drop repetitions: of a key that is swept twice the last value counts, so two combinations may be one run."""
    return list(
        {tuple(sorted(_override_values(combination).items())): combination for combination in combinations}.values()
    )


def _override_values(combination: Sequence[str]) -> dict[str, str]:
    """Return key to value of a combination's overrides; a deletion (`~key`) has no value."""
    parts = (override.partition("=") for override in combination)
    return {key.lstrip("+~"): value.strip("'\"") for key, _, value in parts}


def _varied_values(combinations: list[list[str]]) -> list[dict[str, str]]:
    """Return, of each combination, the keys whose value is not the same in all."""
    values = [_override_values(combination) for combination in combinations]
    keys = [key for key in values[0] if len({trial[key] for trial in values}) > 1]
    return [_in_order({key: trial[key] for key in keys}) for trial in values]


def _in_order(values: dict[str, str]) -> dict[str, str]:
    """Put groups first, then keys in the schema's order and not the order typed, so that the same sweep typed otherwise
    finds the folders of its trials."""
    order = {key.name: place for place, key in enumerate(trainer.config.keys())}
    return dict(sorted(values.items(), key=lambda item: (order.get(item[0], -1), item[0])))


def _trial_names(varied: list[dict[str, str]]) -> list[str]:
    """Build folder names that tell the combination: `method.r=4 method.alpha=8` is `r4_alpha8`."""
    labels = ranking.short_labels(list(varied[0]))
    names = [_trial_name(values, labels) for values in varied]
    # values that differ only in signs a folder's name cannot hold
    duplicates = {name for name, count in Counter(names).items() if count > 1}
    return [
        digest_name([str(values)], f"{n}-") if n in duplicates else n for n, values in zip(names, varied, strict=True)
    ]


def _trial_name(values: dict[str, str], labels: dict[str, str]) -> str:
    name = "_".join(_name_part(labels[key], value) for key, value in values.items())
    return name if len(name) <= MAX_NAME_LENGTH else digest_name([name], name[:MAX_NAME_LENGTH] + "-")


def _name_part(label: str, value: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9.-]+", "-", value.replace("+", "")).strip("-.")
    return f"{label}{plain}" if plain[:1].isdigit() else f"{label}-{plain}"
