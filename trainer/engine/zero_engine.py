"""Run a model under DeepSpeed ZeRO: forward, backward, gradient accumulation and reduction.

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
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from trainer.compat import deepspeed as compat
from trainer.config.schema import TrainConfig
from trainer.data.batching.micro_batch import MicroBatch
from trainer.distributed import process_group as distributed
from trainer.distributed.partition import partition
from trainer.distributed.process_group import World
from trainer.engine.deepspeed_config import deepspeed_config
from trainer.engine.optimizer_state import STATES
from trainer.kernels.label_loss import LabelLoss
from trainer.kernels.trie_attention import trie_context
from trainer.methods import trainable_parameters
from trainer.methods.parameters import is_whole_module
from trainer.methods.target_parameters import adapters_of_parameters


class ZeroEngine:
    """A model under DeepSpeed, up to the optimizer step, which a subclass takes.

    Args:
        model: with its trainable parameters attached.
        loss: of this model.
        zero_stage: 0 to 3.
        world: this process; the process group must be up.
        dtype: of forward and backward.
        trains_base_weights: gradients are too large to be whole on every rank.
        reads_adapters: a kernel on the model reads adapters outside the call of their own module.

    Attributes:
        trainable_params: by name, in the model's order; under ZeRO-3 each rank holds a part of each.
        deepspeed: DeepSpeed's engine.
        optimizer: DeepSpeed's optimizer, or the library's under stage 0.
        optimizer_state: what it holds, and under which names.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        loss: LabelLoss,
        zero_stage: int,
        world: World,
        dtype: torch.dtype,
        trains_base_weights: bool,
        reads_adapters: bool,
    ) -> None:
        self.model, self.loss, self.world, self.dtype, self.zero_stage = model, loss, world, dtype, zero_stage
        self.trainable_params = trainable_parameters(model)
        # Reducing once a step is cheapest, but keeps a whole gradient on every rank: right for adapters, not for all
        # weights, which are reduced (and under stages 2 and 3 partitioned) micro-batch by micro-batch.
        self.reduces_once = not trains_base_weights and zero_stage > 0
        self._trains_base_weights, self._reads_adapters = trains_base_weights, reads_adapters
        if zero_stage == 0:
            for parameter in self.trainable_params.values():
                parameter.data = parameter.data.float()

    def _start(self, config: TrainConfig, optimizer: torch.optim.Optimizer) -> None:
        """Hand the model and the optimizer of its trainable parameters to DeepSpeed. A collective."""
        import deepspeed

        world, self.optimizer_state = self.world, STATES[config.optim.name]
        largest = 0 if self._trains_base_weights else largest_kept(self.model)
        ds_config = deepspeed_config(
            config, self.dtype, world.world_size, largest, checks_gradients=not self.reduces_once
        )
        if self.zero_stage == 3 and not any(map(compat.is_partitioned, self.trainable_params.values())):
            partition(self.model, ds_config, world, self.dtype)
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=self.model, optimizer=optimizer, config=ds_config
        )
        compat.check_optimizer(self.optimizer, self.zero_stage, fp16=self.dtype == torch.float16)
        self.train()  # models are loaded for evaluation, where transformers does not checkpoint gradients

    def _release_at_shutdown(self) -> None:
        if self.world.world_size == 1:  # other ranks may be lost, and it waits for the device
            distributed.before_shutdown(self._release)

    def _release(self) -> None:
        """Part DeepSpeed's optimizer from the parameters: each holds the other where no garbage collection looks."""
        self.deepspeed.destroy()
        vars(self.optimizer).clear()
        for parameter in self.model.parameters():
            vars(parameter).clear()

    @property
    def shares(self) -> list[Tensor]:
        """What the optimizer holds of this rank's share of the trained tensors: fp32, the keys of the moments."""
        if self.zero_stage == 0:
            return list(self.trainable_params.values())
        return compat.fp32_shares(self.optimizer, self.zero_stage)

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

    def _accumulate(
        self, batches: Sequence[MicroBatch], scale: float, seeds: Sequence[int], on_progress: Callable[[], None]
    ) -> tuple[list[Tensor], Tensor]:
        """Accumulate gradients over this rank's micro-batches (forward and backward), then reduce them over the ranks.

        Args:
            batches: as many on every rank, at least one.
            scale: the loss sums are multiplied by it before the backward. DeepSpeed averages gradients over ranks, so
                ``world_size / label_tokens_of_the_global_batch`` gives the gradient of the global batch's mean.
            seeds: one a micro-batch, for dropout and noise.
            on_progress: called after each micro-batch.

        Returns:
            What :meth:`loss_sum` gave of each micro-batch, and whether this rank's own gradients were finite. Both on
            the device, which is not waited for.
        """
        self._gather_adapters()
        sums: list[Tensor] = []
        with self.deepspeed.coalesce_grad_reduction() if self.reduces_once else contextlib.nullcontext():
            for k, (batch, seed) in enumerate(zip(batches, seeds, strict=True)):
                torch.manual_seed(seed)
                if not self.reduces_once:
                    last = k == len(batches) - 1 and self.zero_stage > 0
                    self.deepspeed.set_gradient_accumulation_boundary(last)
                self._before_backward(k)
                batch = batch.to(self.world.device)
                # the backward too: gradient checkpointing embeds and attends again in it
                with self._trie(batch), self._noise(batch, seed):
                    loss = self.loss_sum(batch)
                    self.deepspeed.backward(loss.sum() * scale, scale_wrt_gas=False)
                sums.append(loss.detach())
                on_progress()
            all_finite = self._gradients_are_finite()
        self.deepspeed.set_gradient_accumulation_boundary(True)
        if self.zero_stage == 0:
            self.deepspeed.allreduce_gradients()
        return sums, all_finite

    def _before_backward(self, micro: int) -> None:
        """Prepare for the backward of a micro-batch, the first of an update being 0."""

    def _noise(self, batch: MicroBatch, seed: int) -> AbstractContextManager[None]:
        """Let the forward of a micro-batch have noise, where a run has any."""
        return contextlib.nullcontext()

    def _trie(self, batch: MicroBatch) -> AbstractContextManager[None]:
        return trie_context(batch.paths)

    def _gradients_are_finite(self) -> Tensor:
        are_local = self.reduces_once or self.zero_stage == 0
        return gradients_are_finite(self.trainable_params.values() if are_local else (), self.world.device)

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


def largest_kept(model: nn.Module) -> int:
    """Return how many elements the largest adapter has of those that ZeRO-3 keeps whole on every rank.

    All of the base up to that size is whole on every rank, too. So modules that are trained whole do not count, nor
    do adapters on parameters, which are as large as layers of the base: they are gathered at each use.
    """
    gathered = adapters_of_parameters(model)
    trained = trainable_parameters(model).items()
    kept = [p for name, p in trained if not is_whole_module(name) and id(p) not in gathered]
    return max(map(compat.whole_numel, kept), default=0)


def gradients_are_finite(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """Return whether the norm of the gradients of some parameters is finite: bool scalar on the device."""
    gradients = [p.grad for p in parameters if p.grad is not None and p.grad.numel()]
    if not gradients:
        return torch.ones((), dtype=torch.bool, device=device)
    # The one that DeepSpeed clips by: it is not finite where any gradient is not, nor where it overflows itself.
    return torch.nn.utils.get_total_norm(gradients).isfinite()
