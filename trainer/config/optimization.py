"""The sections of the configuration that say how weights are updated: optimizer, schedule, ZeRO."""

# ruff: noqa: RUF009 - key() returns a dataclass field, made for each class.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.config.fields import key


@dataclass(slots=True)
class OptimConfig:
    """The optimizer. A resumed run keeps it, and may take other values from there on, as with the schedule."""

    name: str = key(
        "adamw",
        "adamw (Loshchilov & Hutter, 2019); adamw_8bit and paged_adamw_8bit: its moments in 8 bits; adafactor: the "
        "second as a row and a column; muon: orthogonal updates of matrices; lion: the sign of one moment",
        choices=("adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "muon", "lion"),
        newer=True,
    )
    learning_rate: float | None = key(
        None,
        "peak rate; null: the method's default (lora 2e-4, full 2e-5), of lion a tenth of it",
        gt=0,
        resume_may_change=True,
    )
    weight_decay: float = key(0.0, "decoupled weight decay", ge=0, resume_may_change=True)
    decay_biases_and_norms: bool | None = key(
        None,
        "weight decay on trained biases and norms too; null: no, but a run that was begun by 0.2 goes on as it began",
        resume_may_change=True,
        newer=True,
    )
    lora_plus_ratio: float | None = key(
        None,
        "LoRA+ (Hayou et al., 2024): learning rate of B divided by that of A, such as 16; null: the same",
        ge=1,
        resume_may_change=True,
        newer=True,
    )
    beta1: float = key(
        0.9, "decay of the first moment; lion: share of the momentum in the update", ge=0, lt=1, resume_may_change=True
    )
    beta2: float = key(0.999, "decay of the second moment", ge=0, lt=1, resume_may_change=True)
    momentum: float | None = key(
        None,
        "decay of the momentum of lion and muon; null: 0.99 and 0.95, their authors'",
        ge=0,
        lt=1,
        resume_may_change=True,
        newer=True,
    )
    eps: float = key(1e-8, "added to the root of the second moment", gt=0, resume_may_change=True)
    max_grad_norm: float = key(
        1.0, "clip the global gradient norm to this; 0 does not clip", ge=0, resume_may_change=True
    )


@dataclass(slots=True)
class ScheduleConfig:
    """Learning rate over the steps."""

    name: str = key(
        "cosine",
        "shape after the warmup; wsd: stays at the peak, then decays in the last decay_ratio of the steps",
        choices=("cosine", "linear", "constant", "wsd"),
        resume_may_change=True,
    )
    warmup_ratio: float = key(
        0.03, "share of all steps in which the rate rises linearly from 0", ge=0, le=1, resume_may_change=True
    )
    warmup_steps: int | None = key(
        None, "the same as a number of steps; overrules warmup_ratio", ge=0, resume_may_change=True
    )
    min_ratio: float = key(
        0.0,
        "cosine, linear, wsd: share of the peak that the rate falls to",
        ge=0,
        le=1,
        resume_may_change=True,
        newer=True,
    )
    decay_ratio: float = key(
        0.1,
        "wsd: share of all steps, at the end, in which the rate falls",
        gt=0,
        le=1,
        resume_may_change=True,
        newer=True,
    )
    decay_shape: str = key(
        "cosine",
        "wsd: how it falls there; 1-sqrt: fast at first",
        choices=("cosine", "linear", "1-sqrt"),
        resume_may_change=True,
        newer=True,
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
