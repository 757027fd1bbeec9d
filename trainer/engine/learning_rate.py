"""Compute the learning rate, a pure function of the step, so nothing of it needs saving."""

from __future__ import annotations

import math

from trainer.config.optimizers import default_learning_rate
from trainer.config.schema import ScheduleConfig, TrainConfig


def peak_learning_rate(config: TrainConfig) -> float:
    """Return ``optim.learning_rate``, or the default of method and optimizer when it is null."""
    given = config.optim.learning_rate
    return default_learning_rate(config.method.name, config.optim.name) if given is None else given


def warmup_steps(schedule: ScheduleConfig, total_steps: int) -> int:
    """Return the steps of linear warmup: ``warmup_steps``, else ``warmup_ratio`` of all, rounded up."""
    if schedule.warmup_steps is not None:
        return min(schedule.warmup_steps, total_steps)
    return math.ceil(schedule.warmup_ratio * total_steps - 1e-9)  # 0.07 * 100 is a little more than 7


def decay_steps(schedule: ScheduleConfig, total_steps: int) -> int:
    """Return the steps in which the rate of ``wsd`` falls: ``decay_ratio`` of all, rounded up, as far as the warmup
    leaves them."""
    wanted = math.ceil(schedule.decay_ratio * total_steps - 1e-9)
    return min(wanted, total_steps - warmup_steps(schedule, total_steps))


def learning_rate(step: int, total_steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Return the rate of one update.

    Args:
        step: from 0.
        total_steps: updates of the whole run.
        peak: the rate after the warmup.
        schedule: shape and warmup. ``cosine`` falls over half a period (Loshchilov & Hutter, 2017), ``linear`` in a
            line, ``constant`` stays; ``wsd`` stays and falls at the end (warmup, stable, decay: Hu et al., 2024), as a
            cosine, a line, or 1 - sqrt (Hägele et al., 2024). Where it falls, it falls to ``min_ratio`` of the peak.
    """
    warmup = warmup_steps(schedule, total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.name == "constant":
        return peak
    shape, falling = schedule.name, total_steps - warmup
    if schedule.name == "wsd":
        shape, falling = schedule.decay_shape, decay_steps(schedule, total_steps)
    progress = max(0, step - (total_steps - falling)) / max(1, falling)
    return peak * (schedule.min_ratio + (1.0 - schedule.min_ratio) * _falling(shape, progress))


def _falling(shape: str, progress: float) -> float:
    """Return what falls from 1 to 0 while ``progress`` rises from 0 to 1."""
    if shape == "linear":
        return 1.0 - progress
    if shape == "1-sqrt":
        return 1.0 - math.sqrt(progress)
    return 0.5 * (1.0 + math.cos(math.pi * progress))
