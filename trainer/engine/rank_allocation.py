"""AdaLoRA's ranks in a run: importance is gathered around each update, ranks are taken from masters and live copies.

Every rank gathers the same whole tensors and decides alike, so nothing is sent.
"""

from __future__ import annotations

import re

from torch import Tensor

from trainer.distributed.whole_tensor import whole_shape
from trainer.engine.engine import Engine, Update
from trainer.engine.whole_state import set_weight, whole_gradient, whole_weight
from trainer.errors import CheckpointError
from trainer.methods import RankAllocator

PREFIX = "base_model.model."
STATE = ("importance", "movement", "kept")


class Allocation:
    """The taking of ranks under one engine.

    Args:
        engine: around a model with AdaLoRA's adapters.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.peft = engine.model.peft_config["default"]
        # Trained biases are nobody's rank.
        self.parts = {n: p for n, p in engine.trained.items() if re.search(r"\.lora_[ABE]\.", n)}
        self.allocator = RankAllocator.of(self.peft, len(self.parts) // 3)
        self.gradients: dict[str, Tensor] = {}

    def before_update(self, step: int) -> None:
        """Keep the gradients of the update with this number, from 1. A collective."""
        if self.allocator.observes(step):
            self.gradients = {name: whole_gradient(self.engine, p) for name, p in self.parts.items()}

    def after_update(self, step: int, update: Update) -> None:
        """Weigh the update and take what ranks are due. A collective."""
        gradients, self.gradients = self.gradients, {}
        if update.applied and gradients:
            limit = self.engine.max_grad_norm
            clipped = min(1.0, limit / (update.grad_norm + 1e-6)) if limit else 1.0
            for name, parameter in self.parts.items():
                gradient = gradients[name] * (clipped / self.engine.loss_scale)
                self.allocator.observe(name, whole_weight(self.engine, parameter), gradient)
        masks = self.allocator.masks(step)
        for name, kept in masks.items():
            weight = whole_weight(self.engine, self.parts[name])
            set_weight(self.engine, self.parts[name], weight.masked_fill(~kept, 0.0))
        self.allocator.finish(step)
        self._tell_peft()

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint: tensors by name, the same on every rank."""
        held = {kind: getattr(self.allocator, kind) for kind in STATE}
        return {f"{kind}/{name}": t.cpu() for kind, tensors in held.items() for name, t in tensors.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over what :meth:`state` gave; every rank is told the same.

        Raises:
            CheckpointError: it is of other tensors.
        """
        for kind in STATE:
            mine = {n.removeprefix(f"{kind}/"): t for n, t in tensors.items() if n.startswith(f"{kind}/")}
            if odd := sorted(set(mine) - set(self.parts)):
                raise CheckpointError(odd[0], reason="is no tensor of this run", hint="checkpoint.resume=never")
            device = self.engine.world.device
            setattr(self.allocator, kind, {name: tensor.to(device) for name, tensor in mine.items()})
        self._tell_peft()

    def ranks(self) -> dict[str, int]:
        """Ranks that each adapted module has left, by its name in the base model."""
        kept = self.allocator.kept
        return {
            name.removeprefix(PREFIX).partition(".lora_E.")[0]: int(kept[name].sum()) if kept else whole_shape(p)[0]
            for name, p in self.parts.items()
            if ".lora_E." in name
        }

    def _tell_peft(self) -> None:
        """A saved adapter has only the ranks that are left, once no more come back; all of them in a run that went
        back to before that."""
        kept = self.allocator.kept.items() if self.allocator.is_final else ()
        self.peft.rank_pattern = {name.removeprefix(PREFIX): m.flatten().tolist() for name, m in kept} or None


def describe(ranks: dict[str, int]) -> str:
    """One line for the user: which kinds of modules were given more."""
    kinds: dict[str, list[int]] = {}
    for name, rank in ranks.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(rank)
    of_kinds = ", ".join(f"{kind} {sum(r) / len(r):.1f}" for kind, r in sorted(kinds.items()))
    every = list(ranks.values())
    return f"ranks: {sum(every) / len(every):.1f} in the mean, {min(every)} to {max(every)} ({of_kinds})"
