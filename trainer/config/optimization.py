"""The sections of the configuration that say how weights are updated: optimizer, schedule, ZeRO."""

# ruff: noqa: RUF009 - key() returns a dataclass field, made for each class.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.config.fields import key


@dataclass(slots=True)
class OptimConfig:
    """AdamW (Loshchilov & Hutter, 2019). A resumed run may take other values from there on, as with the schedule."""

    learning_rate: float | None = key(
        None, "peak rate; null: the method's default (lora 2e-4, full 2e-5)", gt=0, resume_may_change=True
    )
    weight_decay: float = key(0.0, "decoupled weight decay on every trainable parameter", ge=0, resume_may_change=True)
    beta1: float = key(0.9, "decay of the first moment", ge=0, lt=1, resume_may_change=True)
    beta2: float = key(0.999, "decay of the second moment", ge=0, lt=1, resume_may_change=True)
    eps: float = key(1e-8, "added to the root of the second moment", gt=0, resume_may_change=True)
    max_grad_norm: float = key(
        1.0, "clip the global gradient norm to this; 0 does not clip", ge=0, resume_may_change=True
    )


@dataclass(slots=True)
class ScheduleConfig:
    """Learning rate over the steps."""

    name: str = key(
        "cosine", "shape after the warmup", choices=("cosine", "linear", "constant"), resume_may_change=True
    )
    warmup_ratio: float = key(
        0.03, "share of all steps in which the rate rises linearly from 0", ge=0, le=1, resume_may_change=True
    )
    warmup_steps: int | None = key(
        None, "the same as a number of steps; overrules warmup_ratio", ge=0, resume_may_change=True
    )


@dataclass(slots=True)
class ZeroConfig:
    """DeepSpeed ZeRO (Rajbhandari et al., 2020): what is split over the devices instead of copied.

    Where tensors lie does not change the result. A raw DeepSpeed key may: ``extra`` counts.
    """

    stage: int = key(
        2,
        "0 nothing, 1 optimizer states, 2 and gradients, 3 and parameters",
        choices=(0, 1, 2, 3),
        changes_result=False,
    )
    offload_optimizer: str = key("none", "where optimizer states live", choices=("none", "cpu"), changes_result=False)
    offload_params: str = key(
        "none", "where parameters wait (stage 3 only)", choices=("none", "cpu"), changes_result=False
    )
    extra: dict[str, Any] = key(
        {}, "raw DeepSpeed keys, merged last; a key that afina sets itself is refused", resume_may_change=True
    )
