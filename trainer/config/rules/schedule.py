"""Check the ``schedule`` group."""

from __future__ import annotations

import dataclasses

from trainer.config.messages import config_error, listing
from trainer.config.optimization import ScheduleConfig
from trainer.config.schema import TrainConfig
from trainer.config.suggestions import default_value

# The shapes that read a key; one that is not named here is read by all.
READ_BY = {"min_ratio": ("cosine", "linear", "wsd"), "decay_ratio": ("wsd",), "decay_shape": ("wsd",)}


def check_schedule(config: TrainConfig) -> None:
    """Raise a :class:`ConfigError` for the first rule that the group breaks."""
    schedule, total = config.schedule, config.batch.max_steps
    warmup = schedule.warmup_steps
    if warmup is not None and total is not None and warmup > total:
        reason = f"cannot be more than batch.max_steps, which is {total}"
        raise config_error("schedule.warmup_steps", warmup, reason, f"schedule.warmup_steps={total // 10}")
    _only_what_is_read(schedule)
    if schedule.name != "wsd":
        return
    share = schedule.warmup_ratio if warmup is None else warmup / total if total else 0.0
    if share + schedule.decay_ratio > 1:
        reason = f"leaves no room for the warmup, which is {share:g} of all steps"
        raise config_error(
            "schedule.decay_ratio", schedule.decay_ratio, reason, f"schedule.decay_ratio={max(0.01, 1 - share):.2g}"
        )


def _only_what_is_read(schedule: ScheduleConfig) -> None:
    for field in dataclasses.fields(ScheduleConfig):
        value, neutral = getattr(schedule, field.name), default_value(field)
        readers = READ_BY.get(field.name)
        if readers is not None and schedule.name not in readers and value != neutral:
            reason = f"has no meaning for schedule.name={schedule.name}"
            hint = f"schedule.{field.name}={neutral}, or schedule={listing(readers)}"
            raise config_error(f"schedule.{field.name}", value, reason, hint)
