"""AdaLoRA (Zhang et al., 2023): the term that keeps P and Q orthogonal, and which ranks are taken when.

Stock PEFT adds the term to a loss that transformers computes, and takes ranks from tensors that ZeRO has made empty or
will overwrite from its masters. Here the term enters as its gradient, and the taking works on whole tensors, whoever
holds them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from torch import Tensor, nn


class OrthogonalTerm:
    """Adds the gradient of ``weight · mean over all A and B of ‖A·Aᵀ - 1‖`` (Frobenius; ``Bᵀ·B`` for B).

    Registered before DeepSpeed's hooks, so that its backward runs where ZeRO-3 has gathered the layer's tensors.

    Args:
        model: with its adapters.
        weight: of the term.

    Attributes:
        scale: what the backward that comes is multiplied by; 0 leaves the term out. Once a rank and update it is to be
            the loss scale.
    """

    def __init__(self, model: nn.Module, weight: float) -> None:
        self.weight, self.scale = weight, 0.0
        layers = [m for m in model.modules() if isinstance(m, AdaLoraLayer)]
        self.count = 2 * len(layers)
        for layer in layers:
            assert isinstance(layer, nn.Module)
            layer.register_forward_hook(self._hook)

    def _hook(self, layer: Any, _: Any, out: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return out
        return _AddGradient.apply(out, layer.lora_A["default"], layer.lora_B["default"], self)


class _AddGradient(torch.autograd.Function):
    """Lets a layer's output through, and in the backward gives its A and B the term's gradient."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, a: Tensor, b: Tensor, term: OrthogonalTerm) -> Tensor:
        ctx.held, ctx.term = (a, b), term
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        term = ctx.term
        if term.scale == 0:
            return outer[0], None, None, None
        a, b = (p.detach() for p in ctx.held)
        scale = term.weight * term.scale / term.count
        return outer[0], scale * orthogonal_gradient(a), scale * orthogonal_gradient(b.T).T, None


def orthogonal_gradient(rows: Tensor) -> Tensor:
    """The gradient of ``‖rows · rowsᵀ - 1‖`` (Frobenius), in the dtype of ``rows``, of shape (r, width)."""
    exact = rows.float()
    off = exact @ exact.T - torch.eye(len(exact), device=exact.device)
    norm = off.norm()
    return (2 * (off @ exact) / norm.clamp_min(1e-30)).to(rows.dtype)


@dataclass(slots=True)
class RankAllocator:
    """Which ranks are taken at which update; the same on every rank that is told the same.

    The three parts of each adapter are A (r, in), B (out, r) and E (r, 1). A rank's importance is that of its entry of
    E and the mean ones of its row of A and column of B, each entry's smoothed ``|weight · gradient|`` times how much
    that moves (equations 8 to 11 of the paper, as in PEFT).

    Attributes:
        tinit, tfinal, delta, total: of the schedule, in updates.
        target: ranks that are left in all at the end.
        beta1, beta2: decays of importance and of how much it moves.
        importance, movement: smoothed, by the tensor's name.
        kept: which ranks of each E are kept, since the last taking.
    """

    tinit: int
    tfinal: int
    delta: int
    total: int
    target: int
    beta1: float
    beta2: float
    importance: dict[str, Tensor] = field(default_factory=dict)
    movement: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(peft: Any, modules: int) -> RankAllocator:
        """By PEFT's configuration of so many adapted modules."""
        times = (peft.tinit, peft.tfinal, peft.deltaT, peft.total_step)
        return RankAllocator(*times, peft.target_r * modules, peft.beta1, peft.beta2)

    def observes(self, step: int) -> bool:
        """Whether the update with this number, from 1, counts for the importance."""
        return step < self.total - self.tfinal

    def observe(self, name: str, weight: Tensor, gradient: Tensor) -> None:
        """Smooth one tensor's importance: its fp32 weight after the update and the clipped gradient of the update."""
        now = (weight * gradient).abs()
        old = self.importance.get(name, torch.zeros_like(now))
        moved = self.movement.get(name, torch.zeros_like(now))
        self.importance[name] = self.beta1 * old + (1 - self.beta1) * now
        self.movement[name] = self.beta2 * moved + (1 - self.beta2) * (now - self.importance[name]).abs()

    def masks(self, step: int) -> dict[str, Tensor]:
        """Which ranks of each E stay after this update, bool of shape (r, 1); empty when none are taken at it."""
        if step > self.total - self.tfinal:
            return self.kept
        is_last = step == self.total - self.tfinal
        if step <= self.tinit or not (is_last or step % self.delta == 0):
            return {}
        scores = self._scores()
        every = torch.cat([s.flatten() for s in scores.values()])
        budget = self.budget(step, len(every))
        if budget >= len(every):
            return {}
        threshold = every.kthvalue(len(every) - budget).values
        self.kept = {name: score > threshold for name, score in scores.items()}
        return self.kept

    def budget(self, step: int, start: int) -> int:
        """Ranks left in all at an update, of ``start``: falls with the third power of the time that is left."""
        left = 1 - (step - self.tinit) / (self.total - self.tfinal - self.tinit)
        return int((start - self.target) * left**3 + self.target)

    @property
    def is_final(self) -> bool:
        """Whether ranks have been taken for good; told by the importance, which is let go then."""
        return bool(self.kept) and not self.importance

    def finish(self, step: int) -> None:
        """Let go what is no longer read, after the last taking."""
        if step >= self.total - self.tfinal:
            self.importance, self.movement = {}, {}

    def _scores(self) -> dict[str, Tensor]:
        """Of each rank, by the name of its E, of shape (r, 1)."""
        of = {name: value * self.movement[name] for name, value in self.importance.items()}
        scores = {}
        for name, score in of.items():
            if ".lora_E." in name:
                a, b = (of[name.replace(".lora_E.", f".lora_{part}.")] for part in "AB")
                scores[name] = score + a.mean(dim=1, keepdim=True) + b.mean(dim=0)[:, None]
        return scores
