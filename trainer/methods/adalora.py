"""Run AdaLoRA (Zhang et al., 2023): the term that keeps P and Q orthogonal, and the allocation of ranks.

Stock PEFT adds the term to a loss that transformers computes, and prunes ranks in tensors that ZeRO has made empty or
will overwrite from its masters. Here the term enters as its gradient, and pruning works on whole tensors: importance is
gathered around each update, and ranks are pruned in masters and live copies. Every rank of the job gathers the same
tensors and decides alike, so nothing is sent.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trainer.compat.peft import adalora_factors, adalora_layers
from trainer.config.method import MethodConfig, given
from trainer.errors import CheckpointError
from trainer.methods.runtime import MethodRuntime, WholeTensors

PEFT_PREFIX = "base_model.model."
STATE = ("importance", "movement", "kept")


class OrthogonalTerm:
    """Add the gradient of ``weight · mean over all A and B of ‖A·Aᵀ - 1‖`` (Frobenius; ``Bᵀ·B`` for B).

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
        layers = adalora_layers(model)
        self.count = 2 * len(layers)
        for layer in layers:
            layer.register_forward_hook(self._hook)

    def _hook(self, layer: Any, _: Any, out: Tensor) -> Tensor:
        return _AddGradient.apply(out, *adalora_factors(layer), self) if torch.is_grad_enabled() else out


class _AddGradient(torch.autograd.Function):
    """Pass a layer's output through, and in the backward add the term's gradient to its A and B."""

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
    """Return the gradient of ``‖rows · rowsᵀ - 1‖`` (Frobenius), in the dtype of ``rows``, of shape (r, width)."""
    exact = rows.float()
    off = exact @ exact.T - torch.eye(len(exact), device=exact.device)
    norm = off.norm()
    return (2 * (off @ exact) / norm.clamp_min(1e-30)).to(rows.dtype)


@dataclass(slots=True)
class RankAllocator:
    """Decide which ranks are pruned at which update; equal input gives equal decisions on every process.

    The three parts of each adapter are A (r, in), B (out, r) and E (r, 1). A rank's importance is that of its entry of
    E and the mean ones of its row of A and column of B, each entry's smoothed ``|weight · gradient|`` times how much
    that moves (equations 8 to 11 of the paper, as in PEFT).

    Attributes:
        tinit, tfinal, delta, total: the schedule, in updates: pruning starts after ``tinit``, every ``delta`` updates,
            and ends ``tfinal`` before ``total``.
        target: ranks that are left in all at the end.
        beta1, beta2: decays of importance and of how much it moves.
        importance, movement: smoothed, by the tensor's name.
        kept: bool mask (r, 1) of the ranks of each E that are kept, since the last pruning.
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
    def from_peft(config: Any, modules: int) -> RankAllocator:
        """Read the schedule from PEFT's configuration of so many adapted modules."""
        times = (config.tinit, config.tfinal, config.deltaT, config.total_step)
        return RankAllocator(*times, config.target_r * modules, config.beta1, config.beta2)

    def observes(self, step: int) -> bool:
        """Return whether the update with this number, from 1, counts for the importance."""
        return step < self.total - self.tfinal

    def observe(self, name: str, weight: Tensor, gradient: Tensor) -> None:
        """Smooth one tensor's importance: its fp32 weight after the update and the clipped gradient of the update."""
        now = (weight * gradient).abs()
        old = self.importance.get(name, torch.zeros_like(now))
        moved = self.movement.get(name, torch.zeros_like(now))
        self.importance[name] = self.beta1 * old + (1 - self.beta1) * now
        self.movement[name] = self.beta2 * moved + (1 - self.beta2) * (now - self.importance[name]).abs()

    def masks(self, step: int) -> dict[str, Tensor]:
        """Return which ranks of each E stay after this update, bool (r, 1); empty when none are pruned at it."""
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
        """Return the ranks left in all at an update, of ``start``: falls with the third power of the time left."""
        left = 1 - (step - self.tinit) / (self.total - self.tfinal - self.tinit)
        return int((start - self.target) * left**3 + self.target)

    @property
    def is_final(self) -> bool:
        """Whether ranks have been pruned for good: the importance is dropped then."""
        return bool(self.kept) and not self.importance

    def finish(self, step: int) -> None:
        """Drop what is no longer read, after the last pruning."""
        if step >= self.total - self.tfinal:
            self.importance, self.movement = {}, {}

    def _scores(self) -> dict[str, Tensor]:
        """Return the score of each rank, (r, 1), by the name of its E."""
        elements = {name: value * self.movement[name] for name, value in self.importance.items()}
        scores = {}
        for name, score in elements.items():
            if ".lora_E." in name:
                a, b = (elements[name.replace(".lora_E.", f".lora_{part}.")] for part in "AB")
                scores[name] = score + a.mean(dim=1, keepdim=True) + b.mean(dim=0)[:, None]
        return scores


class AdaLoraRuntime(MethodRuntime):
    """AdaLoRA in a run: the orthogonal term in the backward, importance and pruning around each update."""

    def __init__(self, model: Any, method: MethodConfig) -> None:
        super().__init__(model, method)
        self.orthogonal = OrthogonalTerm(model, given(method.orth_reg_weight))
        self.peft_config = model.peft_config["default"]
        self._gradients: dict[str, Tensor] = {}

    def bind(self, tensors: WholeTensors) -> None:
        """Give access to the trainable tensors, once the engine holds them."""
        self.tensors = tensors
        # Trained biases have no rank.
        self.names = [name for name in tensors.names() if re.search(r"\.lora_[ABE]\.", name)]
        self.allocator = RankAllocator.from_peft(self.peft_config, len(self.names) // 3)

    def before_backward(self, scale: float) -> None:
        """Let the orthogonal term count once an update and rank: gradients are averaged over ranks, and summed over
        micro-batches (gradient accumulation)."""
        self.orthogonal.scale = scale

    def before_update(self, step: int) -> None:
        """Keep the gradients of the update with this number, from 1. A collective."""
        if self.allocator.observes(step):
            self._gradients = {name: self.tensors.gradient(name) for name in self.names}

    def after_update(self, step: int, gradient_scale: float | None) -> None:
        """Weigh the update and prune the ranks that are due. A collective."""
        gradients, self._gradients = self._gradients, {}
        if gradient_scale is not None:
            for name, gradient in gradients.items():
                self.allocator.observe(name, self.tensors.weight(name), gradient * gradient_scale)
        for name, kept in self.allocator.masks(step).items():
            self.tensors.set_weight(name, self.tensors.weight(name).masked_fill(~kept, 0.0))
        self.allocator.finish(step)
        self._write_rank_pattern()

    def state(self) -> dict[str, Tensor]:
        """Return importance, movement and kept ranks, CPU tensors by name."""
        by_kind = {kind: getattr(self.allocator, kind) for kind in STATE}
        return {f"{kind}/{name}": t.cpu() for kind, tensors in by_kind.items() for name, t in tensors.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over what :meth:`state` returned.

        Raises:
            CheckpointError: it is of other tensors.
        """
        for kind in STATE:
            saved = {n.removeprefix(f"{kind}/"): t for n, t in tensors.items() if n.startswith(f"{kind}/")}
            if odd := sorted(set(saved) - set(self.names)):
                raise CheckpointError(odd[0], reason="is no tensor of this run", hint="checkpoint.resume=never")
            setattr(self.allocator, kind, {name: t.to(self.tensors.device) for name, t in saved.items()})
        self._write_rank_pattern()

    def ranks(self) -> dict[str, int]:
        """Return the ranks that each adapted module has left, by its name in the base model."""
        kept = self.allocator.kept
        return {
            name.removeprefix(PEFT_PREFIX).partition(".lora_E.")[0]: (
                int(kept[name].sum()) if kept else self.tensors.shape(name)[0]
            )
            for name in self.names
            if ".lora_E." in name
        }

    def describe(self) -> str:
        """Return one line that says which kinds of modules were given more ranks."""
        return describe_ranks(self.ranks())

    def _write_rank_pattern(self) -> None:
        """Give PEFT's configuration the ranks that are left, once none come back: a saved adapter has only those. A run
        that resumed from before that has all of them."""
        kept = self.allocator.kept.items() if self.allocator.is_final else ()
        pattern = {name.removeprefix(PEFT_PREFIX): mask.flatten().tolist() for name, mask in kept}
        self.peft_config.rank_pattern = pattern or None


def describe_ranks(ranks: dict[str, int]) -> str:
    """Describe ranks by module name in one line: mean, extremes, and the mean of each kind of module."""
    kinds: dict[str, list[int]] = {}
    for name, rank in ranks.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(rank)
    by_kind = ", ".join(f"{kind} {sum(r) / len(r):.1f}" for kind, r in sorted(kinds.items()))
    every = list(ranks.values())
    return f"ranks: {sum(every) / len(every):.1f} in the mean, {min(every)} to {max(every)} ({by_kind})"
