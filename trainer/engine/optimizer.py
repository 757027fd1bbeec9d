"""Make the optimizer; compute the learning rate, a pure function of the step, so nothing of it needs saving."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from trainer.config.method import METHODS
from trainer.config.schema import OptimConfig, ScheduleConfig, TrainConfig


def peak_learning_rate(config: TrainConfig) -> float:
    """Return ``optim.learning_rate``, or the method's default when it is null."""
    given = config.optim.learning_rate
    return METHODS[config.method.name].learning_rate if given is None else given


def adamw(parameters: Iterable[nn.Parameter], optim: OptimConfig, on_gpu: bool) -> torch.optim.AdamW:
    """Make AdamW (Loshchilov & Hutter, 2019). Its rate is set by the loop before each step, so it starts at zero."""
    return torch.optim.AdamW(
        parameters,
        lr=0.0,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=True if on_gpu else None,
    )


class GroupwiseAdamW(torch.optim.AdamW):
    """AdamW over parameter groups that clip, and skip a step, each on its own.

    Two settings a group beside AdamW's: ``takes_step``, whether the next :meth:`step` changes anything of it, and
    ``gradient_scale``, what its gradients are multiplied by before. Both are set by whoever knows the gradients.
    """

    def __init__(self, groups: Iterable[tuple[Iterable[nn.Parameter], OptimConfig]], on_gpu: bool) -> None:
        settings = [
            {
                "params": list(parameters),
                "betas": (optim.beta1, optim.beta2),
                "eps": optim.eps,
                "weight_decay": optim.weight_decay,
                "takes_step": True,
                "gradient_scale": 1.0,
            }
            for parameters, optim in groups
        ]
        super().__init__(settings, lr=0.0, fused=True if on_gpu else None)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Scale the gradients and take one step. A group that takes none loses its gradients, and nothing else."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if not group["takes_step"]:
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad.mul_(group["gradient_scale"])
        return super().step(closure)


def warmup_steps(schedule: ScheduleConfig, total_steps: int) -> int:
    """Return the steps of linear warmup: ``warmup_steps``, else ``warmup_ratio`` of all, rounded up."""
    if schedule.warmup_steps is not None:
        return min(schedule.warmup_steps, total_steps)
    return math.ceil(schedule.warmup_ratio * total_steps - 1e-9)  # 0.07 * 100 is a little more than 7


def learning_rate(step: int, total_steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Return the rate of one update.

    Args:
        step: from 0.
        total_steps: updates of the whole run.
        peak: the rate after the warmup.
        schedule: shape and warmup. ``cosine`` falls to 0 over half a period (Loshchilov & Hutter, 2017), ``linear``
            falls to 0 in a line, ``constant`` stays.
    """
    warmup = warmup_steps(schedule, total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.name == "constant":
        return peak
    progress = (step - warmup) / max(1, total_steps - warmup)
    if schedule.name == "linear":
        return peak * (1.0 - progress)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
