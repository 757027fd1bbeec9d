"""Show one trial of an engine as a run of its own sees its engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.data.batching.micro_batch import MicroBatch
from trainer.distributed.process_group import World
from trainer.engine.optimizer_state import AdamState
from trainer.together.engine import TrialsEngine
from trainer.together.trial_runtime import TrialRuntime


@dataclass(frozen=True, slots=True)
class TrialView:
    """One trial of an engine, with the names of a run of its own: what keeps and reads state, and scores.

    Attributes:
        engine: of all trials.
        name: of the trial's adapter.
        world: this process.
        zero_stage: 0 to 3.
        dtype: of forward and backward.
        model: with all adapters.
        runtime: of the trial.
    """

    engine: TrialsEngine
    name: str
    world: World
    zero_stage: int
    dtype: torch.dtype
    model: nn.Module
    runtime: TrialRuntime

    @property
    def deepspeed(self) -> Any:
        """DeepSpeed's engine, of all trials."""
        return self.engine.deepspeed

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's optimizer, or torch's under stage 0, of all trials."""
        return self.engine.optimizer

    @property
    def optimizer_state(self) -> AdamState:
        """What it holds of the trained tensors."""
        return self.engine.optimizer_state

    @property
    def trainable_params(self) -> dict[str, nn.Parameter]:
        """The trial's own, by the names that a run of its own gives them."""
        return self.engine.parameters[self.name]

    @property
    def shares(self) -> list[Tensor]:
        """What the optimizer holds of this rank's share of them: fp32, the keys of the moments."""
        return self.engine.shares_of(self.name)

    @property
    def decays_all(self) -> bool:
        """Biases and norms decay as all else does; the trials of a group train none."""
        return bool(self.engine.configs[self.name].optim.decay_biases_and_norms)

    def loss_sum(self, batch: MicroBatch) -> Tensor:
        """Return the trial's summed cross-entropy of one micro-batch: float32 scalar."""
        with self.engine.only(self.name):
            return self.engine.loss_sum(batch)[0]

    def label_logits(self, batch: MicroBatch) -> Tensor:
        """Return the trial's logits at the label positions of one micro-batch, (labels, vocabulary)."""
        with self.engine.only(self.name):
            return self.engine.label_logits(batch)


def view_trial(engine: TrialsEngine, name: str) -> TrialView:
    """Return what checkpoints, evaluations and the end of a run use of an engine, for one trial."""
    return TrialView(engine, name, engine.world, engine.zero_stage, engine.dtype, engine.model, engine.runtimes[name])
