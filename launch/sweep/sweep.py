"""Run a sweep: every combination of the swept keys is a run of its own, one after the other; then rank them in a table.

A sweep is a folder of run folders: ``<run.dir>/<sweep>/<trial>/``. Started again, it does what is left.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import trainer.config
from launch import process, torchrun
from launch.sweep import report as ranking
from launch.trials import Job, Trial, default_run_name, digest_name, run_shared, take_turns
from trainer.errors import ConfigError

logger = logging.getLogger(__name__)

# a folder's name may have 255 bytes; the rest is left to the files' own names and to whoever must read it
MAX_NAME_LENGTH = 80


def plan_sweep(typed: Sequence[str], config_file: Path | None = None) -> tuple[Path, list[Trial]]:
    """Plan all trials of a sweep, their configs composed and checked; start nothing.

    Returns:
        The sweep's folder and its trials, in the order in which Hydra expands them.

    Raises:
        ConfigError: no key has several values, or a combination cannot be used.
    """
    if not trainer.config.is_sweep(typed):
        raise ConfigError("sweep", reason="no key has several values", hint="separate them by commas: method.r=8,16,32")
    combinations = _drop_duplicates(trainer.config.expand_sweep(typed))
    configs = [trainer.config.load(combination, config_file) for combination in combinations]
    # only a name given here counts: a config file of an old run holds that run's name
    given = configs[0].run.name if "run.name" in _override_values(combinations[0]) else None
    varied = _varied_values(combinations)
    names = _trial_names(varied) if varied[0] else [default_run_name(configs[0])]
    # else a digest of what is trained, so that the same sweep finds its folder again; with the trials' names, since
    # sweeps over micro sizes or ZeRO stages all train the same
    sweep_name = given or digest_name(
        [f"{default_run_name(c)} {name}" for c, name in zip(configs, names, strict=True)], "sweep-"
    )
    sweep_folder = Path(configs[0].run.dir) / sweep_name

    trials = []
    for name, values, combination, config in zip(names, varied, combinations, configs, strict=True):
        where = {"run.dir": str(sweep_folder), "run.name": name, "log.group": config.log.group or sweep_name}
        # not composed again: at 0.2 s a config a wide sweep would keep its user waiting
        placed = replace(
            config,
            run=replace(config.run, dir=where["run.dir"], name=name),
            log=replace(config.log, group=where["log.group"]),
        )
        overrides = [*combination, *(f"{key}={torchrun.quote(value)}" for key, value in where.items())]
        trials.append(Trial(name, overrides, values, placed))
    return sweep_folder, trials


def run_sweep(overrides: Sequence[str], config_file: Path | None = None) -> int:
    """Run every combination and show the ranked table, also written to `sweep.csv`, `sweep.md` and `report.html`.

    A failed trial is reported and the others go on; a finished one is not redone. One that another process trains is
    waited for at the end, so that equal sweeps started together share the trials and show the same table.

    Returns:
        0 when all trials finished, 1 when any failed, 75 (or 128 + signal) when it was stopped.

    Raises:
        ConfigError: a combination cannot be used; nothing has been started.
    """
    folder, trials = plan_sweep(overrides, config_file)
    logger.info(f"sweep of {len(trials)} runs in {folder}")
    errors: dict[str, str] = {}

    def run(number: int, trial: Trial) -> Job:
        code, error = yield from run_shared(trial, f"[{number}/{len(trials)}] {trial.name}", config_file)
        if code and code not in process.STOPPED:
            errors[trial.name] = error
        return code

    stopped = take_turns([run(number, trial) for number, trial in enumerate(trials, 1)])
    records = ranking.rank(trials, errors)
    ranking.write(folder, records)
    ranking.show(records)
    ranking.write_page(folder)
    return stopped or int(bool(errors))


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
    """Return, of each combination, the keys whose value is not the same in all.

    Groups first, then keys in the schema's order and not the order typed, so that the same sweep typed otherwise finds
    the folders of its trials.
    """
    order = {key.name: place for place, key in enumerate(trainer.config.keys())}
    values = [_override_values(combination) for combination in combinations]
    keys = [key for key in values[0] if len({trial[key] for trial in values}) > 1]
    keys.sort(key=lambda key: (order.get(key, -1), key))
    return [{key: trial[key] for key in keys} for trial in values]


def _trial_names(varied: list[dict[str, str]]) -> list[str]:
    """Build folder names that tell the combination: `method.r=4 method.alpha=8` is `r4_alpha8`."""
    labels = ranking.short_labels(list(varied[0]))
    names = ["_".join(_name_part(labels[key], value) for key, value in values.items()) for values in varied]
    names = [
        name if len(name) <= MAX_NAME_LENGTH else digest_name([name], name[:MAX_NAME_LENGTH] + "-") for name in names
    ]
    # values that differ only in signs a folder's name cannot hold
    duplicates = {name for name, count in Counter(names).items() if count > 1}
    return [
        digest_name([str(values)], f"{n}-") if n in duplicates else n for n, values in zip(names, varied, strict=True)
    ]


def _name_part(label: str, value: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9.-]+", "-", value.replace("+", "")).strip("-.")
    return f"{label}{plain}" if plain[:1].isdigit() else f"{label}-{plain}"
