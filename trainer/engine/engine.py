"""Train one run's model under DeepSpeed: clipping and the optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.compat import deepspeed as compat
from trainer.config.schema import TrainConfig
from trainer.data.batching.micro_batch import MicroBatch
from trainer.distributed.process_group import World
from trainer.engine.optimizers import make_optimizer, split_for_muon, token_tables
from trainer.engine.parameter_groups import decay_spared, parameter_groups, set_rates
from trainer.engine.zero_engine import ZeroEngine
from trainer.kernels.embedding_noise import EmbeddingNoise
from trainer.kernels.label_loss import LabelLoss
from trainer.methods import MethodRuntime


@dataclass(frozen=True, slots=True)
class Update:
    """One optimizer step.

    Attributes:
        grad_norm: global gradient norm before clipping.
        applied: whether the step was taken; a gradient that is not finite is not applied, on any rank.
        gradient_scale: what the reduced gradient was multiplied by: clipping, and fp16's loss scale taken out.
    """

    grad_norm: float
    applied: bool
    gradient_scale: float = 1.0


class Engine(ZeroEngine):
    """The model of one run, under one method and one optimizer.

    Args:
        model: with its trainable parameters attached.
        loss: of this model.
        config: the whole configuration.
        world: this process; the process group must be up.
        dtype: of forward and backward.
        runtime: of the method; its hooks are on the model already.
        reads_adapters: a kernel on the model reads adapters outside the call of their own module.

    Attributes:
        decays_all: biases and norms decay as all else does.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        loss: LabelLoss,
        config: TrainConfig,
        world: World,
        dtype: torch.dtype,
        runtime: MethodRuntime,
        reads_adapters: bool = False,
    ) -> None:
        super().__init__(
            model=model,
            loss=loss,
            zero_stage=config.zero.stage,
            world=world,
            dtype=dtype,
            trains_base_weights=runtime.trains_base_weights,
            reads_adapters=reads_adapters,
        )
        alpha = config.model.neftune_alpha
        self._embedding_noise = None if alpha is None else EmbeddingNoise(model, alpha)
        self.runtime, self.max_grad_norm = runtime, config.optim.max_grad_norm
        groups = parameter_groups(model, self.trainable_params, config)
        self.decays_all, self._weight_decay = bool(config.optim.decay_biases_and_norms), config.optim.weight_decay
        if config.optim.name == "muon":
            groups = split_for_muon(groups, token_tables(model))
        self._start(config, make_optimizer(groups, config.optim))
        self._links_moments = len(groups) > 1  # DeepSpeed does when the first group alone has taken its first step
        self._release_at_shutdown()

    def _before_backward(self, micro: int) -> None:
        self.runtime.before_backward(self.loss_scale if micro == 0 else 0.0)

    def _noise(self, batch: MicroBatch, seed: int) -> AbstractContextManager[None]:
        return super()._noise(batch, seed) if self._embedding_noise is None else self._embedding_noise.of(batch, seed)

    def accumulate(
        self,
        batches: Sequence[MicroBatch],
        scale: float,
        seeds: Sequence[int],
        on_progress: Callable[[], None] = lambda: None,
    ) -> tuple[Tensor, Tensor]:
        """Accumulate gradients over this rank's micro-batches, then reduce them (:meth:`ZeroEngine._accumulate`).

        Returns:
            The unscaled loss sum of each micro-batch, float32 of shape (micro-batches,), and whether this rank's own
            gradients were all finite, a bool scalar (always true where they are reduced micro-batch by micro-batch, and
            cannot be told apart). Both on the device, which is not waited for.
        """
        sums, all_finite = self._accumulate(batches, scale, seeds, on_progress)
        return torch.stack(sums), all_finite

    def update(self, learning_rate: float) -> Update:
        """Clip, then take one optimizer step. A step whose gradient norm is not finite is not taken, on any rank."""
        set_rates(self.optimizer.param_groups, learning_rate)
        loss_scale = self.loss_scale  # DeepSpeed may change it in the step
        if self.zero_stage == 0:
            limit = self.max_grad_norm or math.inf
            norm = float(torch.nn.utils.clip_grad_norm_(list(self.trainable_params.values()), limit))
            applied = math.isfinite(norm)
            if applied:
                self.deepspeed.step()
            else:
                self.deepspeed.zero_grad()
        else:
            self.deepspeed.step()
            norm = float(self.deepspeed.get_global_grad_norm())
            applied = not compat.step_was_skipped(self.optimizer)
        if applied and self._links_moments:
            compat.link_moments(self.optimizer, self.zero_stage)
            self._links_moments = False
        clipped = min(1.0, self.max_grad_norm / (norm + 1e-6)) if self.max_grad_norm else 1.0
        return Update(norm, applied, clipped / loss_scale)

    def decay_all(self) -> None:
        """Let biases and norms decay from here on, too."""
        self.decays_all = True
        decay_spared(self.optimizer.param_groups, self._weight_decay)

    def discard_gradients(self) -> None:
        """Drop what was accumulated for an update that is not made."""
        if self.zero_stage == 0:
            self.deepspeed.zero_grad()
        else:
            with compat.overflowing(self.optimizer, self.zero_stage):
                self.deepspeed.step()
