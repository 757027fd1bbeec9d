"""Write a sweep as a YAML file of Weights & Biases, whose agents start ``afina train`` for each trial."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import yaml

from launch import torchrun
from launch.sweep.sampler import DEFAULT_TRIALS
from launch.sweep.space import MULTIPLES, Space
from trainer.config.suggestions import config_fields
from trainer.config.sweep_axes import Axis, Interval, parse_axis
from trainer.errors import ConfigError
from trainer.files import write_atomically

METHODS = {"grid": "grid", "random": "random", "tpe": "bayes"}


def write_wandb_file(file: Path, space: Space) -> str:
    """Write the file; return what to type next.

    Raises:
        ConfigError: W&B cannot express the sweep.
    """
    write_atomically(file, yaml.safe_dump(wandb_sweep(space), sort_keys=False, width=100).encode())
    return f"wandb sweep {shlex.quote(str(file))}"


def wandb_sweep(space: Space) -> dict[str, Any]:
    """Return a sweep as W&B describes one; the command is that of a single run, from this folder.

    Raises:
        ConfigError: W&B cannot express it.
    """
    settings = space.config.sweep
    if settings.alpha_over_rank:
        reason = "depends on another key, and W&B's keys are independent"
        hint = "list them: method.alpha=16,32,64"
        raise ConfigError(MULTIPLES, value=settings.alpha_over_rank, reason=reason, hint=hint)
    if settings.early_stopping != "none":
        reason = "is decided here, and W&B's agents decide for themselves"
        hint = "sweep.early_stopping=none"
        raise ConfigError("sweep.early_stopping", value=settings.early_stopping, reason=reason, hint=hint)
    fixed = {axis.key: axis for axis in map(parse_axis, space.overrides) if not axis.is_swept}
    overrides = [f"{key}={axis.values[0]}" for key, axis in fixed.items() if key not in ("run.name", "run.dir")]
    config, name = space.config, fixed.get("run.name")
    folder = Path(config.run.dir) / (name.values[0] if name else "")
    head = ["afina", "train", *(["--config", str(space.config_file)] if space.config_file else [])]
    sweep: dict[str, Any] = {
        "method": METHODS[settings.sampler],
        "metric": {"name": space.metric, "goal": "minimize" if space.lower_is_better else "maximize"},
        "parameters": {axis.key: _parameter(axis) for axis in space.axes},
        # each run is named by what it trains: one name for all would be one folder
        "command": [*head, *overrides, f"run.dir={torchrun.quote(str(folder))}", "run.name=null", "${args_no_hyphens}"],
        "project": config.log.project,
    }
    if name:
        sweep["name"] = name.values[0]
    return sweep if settings.sampler == "grid" else {**sweep, "run_cap": settings.trials or DEFAULT_TRIALS}


def _parameter(axis: Axis) -> dict[str, Any]:
    if axis.interval is None:
        return {"values": [_value(axis.key, value) for value in axis.values]}
    interval = axis.interval
    if interval.is_whole and not interval.is_log:
        return {"distribution": "int_uniform", "min": int(interval.low), "max": int(interval.high)}
    return {"distribution": _distribution(interval), "min": interval.low, "max": interval.high}


def _distribution(interval: Interval) -> str:
    whole = "q_" if interval.is_whole else ""
    return f"{whole}log_uniform_values" if interval.is_log else "uniform"


def _value(key: str, text: str) -> Any:
    """Return a number as one, so that W&B's pictures have an axis for it."""
    kind = config_fields()[key].base if key in config_fields() else str
    return kind(text) if kind in (int, float) and text != "null" else text
