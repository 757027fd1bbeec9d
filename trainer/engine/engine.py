"""Run a model under DeepSpeed ZeRO: gradient accumulation, reduction, clipping and the optimizer step.

Mixed precision by stage, and what a rank holds of the trainable parameters:

=======  ==========================================================================================
stage 0  the parameters themselves, fp32; a 16-bit forward runs under autocast
stage 1  16-bit parameters, and its share of their fp32 masters and moments
stage 2  the same, and only its share of the reduced gradients
stage 3  its share of everything
=======  ==========================================================================================
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.compat import deepspeed as compat
from trainer.config.schema import TrainConfig
from trainer.data.batching.micro_batch import MicroBatch
from trainer.distributed import process_group as distributed
from trainer.distributed.partition import partition
from trainer.distributed.process_group import World
from trainer.engine.deepspeed_config import deepspeed_config
from trainer.engine.optimizer import adamw
from trainer.kernels.label_loss import LabelLoss
from trainer.kernels.trie_attention import trie_context
from trainer.methods import MethodRuntime, trainable_parameters


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


class Engine:
    """A model under DeepSpeed.

    Args:
        model: with its trainable parameters attached.
        loss: of this model.
        config: the whole configuration.
        world: this process; the process group must be up.
        dtype: of forward and backward.
        runtime: of the method; its hooks are on the model already.
        reads_adapters: a kernel on the model reads adapters outside the call of their own module.

    Attributes:
        trainable_params: by name, in the model's order; under ZeRO-3 each rank holds a part of each.
        deepspeed: DeepSpeed's engine.
        optimizer: DeepSpeed's optimizer, or torch's under stage 0.
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
        import deepspeed

        self.model, self.loss, self.world, self.dtype, self.runtime = model, loss, world, dtype, runtime
        self.zero_stage = config.zero.stage
        self.max_grad_norm = config.optim.max_grad_norm
        self.trainable_params = trainable_parameters(model)
        # Reducing once a step is cheapest, but keeps a whole gradient on every rank: right for adapters, not for all
        # weights, which are reduced (and under stages 2 and 3 partitioned) micro-batch by micro-batch.
        self.reduces_once = not runtime.trains_base_weights and self.zero_stage > 0
        if self.zero_stage == 0:
            for parameter in self.trainable_params.values():
                parameter.data = parameter.data.float()
        optimizer = adamw(self.trainable_params.values(), config.optim, on_gpu=world.device.type == "cuda")
        sizes = [] if runtime.trains_base_weights else [p.numel() for p in self.trainable_params.values()]
        ds_config = deepspeed_config(
            config, dtype, world.world_size, max(sizes, default=0), checks_gradients=not self.reduces_once
        )
        if self.zero_stage == 3:
            partition(model, ds_config, world, dtype)
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
        compat.check_optimizer(self.optimizer, self.zero_stage, fp16=dtype == torch.float16)
        if world.world_size == 1:  # other ranks may be lost, and it waits for the device
            distributed.before_shutdown(self._release)
        self._reads_adapters = reads_adapters
        self.train()  # models are loaded for evaluation, where transformers does not checkpoint gradients

    def _release(self) -> None:
        """Part DeepSpeed's optimizer from the parameters: each holds the other where no garbage collection looks."""
        self.deepspeed.destroy()
        vars(self.optimizer).clear()
        for parameter in self.model.parameters():
            vars(parameter).clear()

    @property
    def loss_scale(self) -> float:
        """DeepSpeed's fp16 loss scale; 1 in other dtypes."""
        return compat.loss_scale(self.optimizer) if self.dtype == torch.float16 else 1.0

    def loss_sum(self, batch: MicroBatch) -> Tensor:
        """Return the summed cross-entropy of one micro-batch: float32 scalar."""
        with trie_context(batch.paths), self._autocast():
            return self.loss(self.deepspeed, batch)

    def label_logits(self, batch: MicroBatch) -> Tensor:
        """Return the logits at the label positions of one micro-batch, (labels, vocabulary)."""
        with trie_context(batch.paths), self._autocast():
            return self.loss.logits(self.deepspeed, batch)

    def _autocast(self) -> torch.autocast:
        wanted = self.zero_stage == 0 and self.dtype != torch.float32
        return torch.autocast(self.world.device.type, self.dtype, enabled=wanted)

    def accumulate(
        self,
        batches: Sequence[MicroBatch],
        scale: float,
        seeds: Sequence[int],
        on_progress: Callable[[], None] = lambda: None,
    ) -> tuple[Tensor, Tensor]:
        """Accumulate gradients over this rank's micro-batches (forward and backward), then reduce them over the ranks.

        Args:
            batches: as many on every rank, at least one.
            scale: the loss sums are multiplied by it before the backward. DeepSpeed averages gradients over ranks, so
                ``world_size / label_tokens_of_the_global_batch`` gives the gradient of the global batch's mean.
            seeds: one a micro-batch, for dropout.
            on_progress: called after each micro-batch.

        Returns:
            The unscaled loss sum of each micro-batch, float32 of shape (micro-batches,), and whether this rank's own
            gradients were all finite, a bool scalar (always true where they are reduced micro-batch by micro-batch, and
            cannot be told apart). Both on the device, which is not waited for.
        """
        self._gather_adapters()
        sums: list[Tensor] = []
        with self.deepspeed.coalesce_grad_reduction() if self.reduces_once else contextlib.nullcontext():
            for k, (batch, seed) in enumerate(zip(batches, seeds, strict=True)):
                torch.manual_seed(seed)
                if not self.reduces_once:
                    last = k == len(batches) - 1 and self.zero_stage > 0
                    self.deepspeed.set_gradient_accumulation_boundary(last)
                self.runtime.before_backward(self.loss_scale if k == 0 else 0.0)
                batch = batch.to(self.world.device)
                with trie_context(batch.paths):  # the backward too: gradient checkpointing attends again in it
                    loss = self.loss_sum(batch)
                    self.deepspeed.backward(loss * scale, scale_wrt_gas=False)
                sums.append(loss.detach())
                on_progress()
            are_local = self.reduces_once or self.zero_stage == 0
            all_finite = gradients_are_finite(self.trainable_params.values() if are_local else (), self.world.device)
        self.deepspeed.set_gradient_accumulation_boundary(True)
        if self.zero_stage == 0:
            self.deepspeed.allreduce_gradients()
        return torch.stack(sums), all_finite

    def update(self, learning_rate: float) -> Update:
        """Clip, then take one AdamW step. A step whose gradient norm is not finite is not taken, on any rank."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
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
        clipped = min(1.0, self.max_grad_norm / (norm + 1e-6)) if self.max_grad_norm else 1.0
        return Update(norm, applied, clipped / loss_scale)

    def discard_gradients(self) -> None:
        """Drop what was accumulated for an update that is not made."""
        if self.zero_stage == 0:
            self.deepspeed.zero_grad()
        else:
            with compat.overflowing(self.optimizer, self.zero_stage):
                self.deepspeed.step()

    def _gather_adapters(self) -> None:
        """Gather adapters under ZeRO-3 for the kernel that reads them. A collective, where any is partitioned.

        It keeps them whole from a step to the next. Before the first one, and after a save or a restore has looked at
        one, they are whole only inside the call of their own module.
        """
        if self._reads_adapters and self.zero_stage == 3:
            self.optimizer.checkpoint_event_epilogue()

    def train(self) -> None:
        """Turn dropout and gradient checkpointing on."""
        self.deepspeed.train()

    def eval(self) -> None:
        """Turn dropout and gradient checkpointing off."""
        self.deepspeed.eval()
        self._gather_adapters()


def gradients_are_finite(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """Return whether the norm of the gradients of some parameters is finite: bool scalar on the device."""
    gradients = [p.grad for p in parameters if p.grad is not None and p.grad.numel()]
    if not gradients:
        return torch.ones((), dtype=torch.bool, device=device)
    # The one that DeepSpeed clips by: it is not finite where any gradient is not, nor where it overflows itself.
    return torch.nn.utils.get_total_norm(gradients).isfinite()
