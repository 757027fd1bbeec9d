"""Train the LoRA adapters of several trials on one base under one DeepSpeed engine, each as a run of its own would.

The trials are parameter groups: each has its own rate, betas, weight decay and clipping. A trial that is not named in
an update stays as it is, to the bit; so does one whose gradient is not finite.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from peft import PeftModel
from torch import Tensor

from trainer.compat import deepspeed as compat
from trainer.compat.deepspeed_groups import fp32_shares_by_group, reduced_gradients
from trainer.config.schema import TrainConfig
from trainer.data.batching.micro_batch import MicroBatch
from trainer.distributed.process_group import World, sum_over_ranks
from trainer.engine.engine import Update
from trainer.engine.optimizer_state import copy_shares, write_shares
from trainer.engine.optimizers import GroupwiseAdamW
from trainer.engine.zero_engine import ZeroEngine, gradients_are_finite
from trainer.kernels.label_loss import LabelLoss
from trainer.kernels.trial_lora import ActiveTrials
from trainer.kernels.trie_attention import trie_context
from trainer.methods.parameters import trial_parameters
from trainer.together.trial_runtime import TrialRuntime


class TrialsEngine(ZeroEngine):
    """A model with an adapter a trial.

    Args:
        model: with the adapters attached (``attach_trials``) and its layers patched (``patch_trial_linears``).
        loss: of this model.
        configs: the whole configuration of each trial, by the name of its adapter; ``zero`` is the same in all.
        active: the trials that a forward is for; what the layers read.
        world: this process; the process group must be up.
        dtype: of forward and backward, not fp16: a loss scale would be one for all.

    Attributes:
        configs: of the trials that are there, in the order of the parameter groups.
        active: as given.
        runtimes: of each trial.
    """

    model: PeftModel

    def __init__(
        self,
        *,
        model: PeftModel,
        loss: LabelLoss,
        configs: Mapping[str, TrainConfig],
        active: ActiveTrials,
        world: World,
        dtype: torch.dtype,
    ) -> None:
        self.configs, self.active = dict(configs), active
        zero = next(iter(configs.values())).zero
        assert all(config.zero == zero for config in configs.values()), "the trials of a group share one engine"
        assert dtype != torch.float16, "fp16 has one loss scale for all trials"
        offloads = {zero.offload_optimizer, zero.offload_params}
        assert offloads == {"none"}, "offloaded gradients are not where the norms are computed"
        self.runtimes = {name: TrialRuntime(model, config.method, name) for name, config in configs.items()}
        super().__init__(
            model=model,
            loss=loss,
            zero_stage=zero.stage,
            world=world,
            dtype=dtype,
            trains_base_weights=False,
            reads_adapters=True,
        )
        self._begin()
        self._release_at_shutdown()

    def _begin(self) -> None:
        """Hand the trials that are there to a new DeepSpeed engine, with moments as before the first update."""
        self.parameters = {name: trial_parameters(self.model, name) for name in self.configs}
        groups = [(self.parameters[name].values(), config.optim) for name, config in self.configs.items()]
        self._adam = GroupwiseAdamW(groups)
        first = next(iter(self.configs.values()))
        unclipped = dataclasses.replace(first, optim=dataclasses.replace(first.optim, max_grad_norm=0.0))
        self._start(unclipped, self._adam)
        self.optimizer_state.reset(self.optimizer, self.zero_stage, self.shares, 0)
        self._accumulated: tuple[str, ...] = ()

    def shares_of(self, name: str) -> list[Tensor]:
        """Return what the optimizer holds of this rank's share of a trial's tensors: fp32, the keys of the moments."""
        if self.zero_stage == 0:
            return list(self.parameters[name].values())
        by_group = fp32_shares_by_group(self.optimizer, self.zero_stage, len(self.configs))
        return by_group[list(self.configs).index(name)]

    @contextlib.contextmanager
    def only(self, *names: str) -> Iterator[None]:
        """Let the forwards inside be for these trials."""
        before, self.active.names = self.active.names, names
        try:
            yield
        finally:
            self.active.names = before

    def loss_sum(self, batch: MicroBatch) -> Tensor:
        """Return each active trial's summed cross-entropy of one micro-batch: float32, (active trials,)."""
        with self._trie(batch), self._autocast():
            return self.loss(self.deepspeed, batch, trials=len(self.active.names))

    @contextlib.contextmanager
    def _trie(self, batch: MicroBatch) -> Iterator[None]:
        trials, shared = len(self.active.names), self.active.shares_layers
        with trie_context(batch.paths, trials, shared), self.active.on_same_tokens():
            yield

    def activate(self, names: Sequence[str]) -> None:
        """Let the forwards that follow be for these trials, their rows in this order."""
        self.active.names = tuple(names)

    def accumulate_trials(
        self,
        batches: Sequence[MicroBatch],
        scale: float,
        seeds: Sequence[int],
        chunks: Sequence[Sequence[str]],
        on_progress: Callable[[], None] = lambda: None,
    ) -> tuple[Tensor, Tensor]:
        """Accumulate the gradients of some trials, then reduce them over the ranks, once for all.

        Args:
            batches: of one trial, as many on every rank, at least one.
            scale: as :meth:`ZeroEngine._accumulate` takes it.
            seeds: one a micro-batch.
            chunks: the trials, in lists of those that share a forward.
            on_progress: called after each forward and backward.

        Returns:
            The unscaled loss sums, float32 of shape (micro-batches, trials), and whether this rank's own gradients of
            each trial were all finite, bool of shape (trials,); trials in the order of the chunks.
        """
        self._chunks, self._micros = [tuple(chunk) for chunk in chunks], len(batches)
        self._accumulated = tuple(name for chunk in chunks for name in chunk)
        micro_batches = list(batches) * len(chunks)
        sums, finite = self._accumulate(micro_batches, scale, list(seeds) * len(chunks), on_progress)
        by_chunk = [sums[begin : begin + len(batches)] for begin in range(0, len(sums), len(batches))]
        return torch.cat([torch.stack(own) for own in by_chunk], dim=1), finite

    def _before_backward(self, micro: int) -> None:
        self.active.names = self._chunks[micro // self._micros]

    def _gradients_are_finite(self) -> Tensor:
        return torch.stack(
            [gradients_are_finite(self.parameters[name].values(), self.world.device) for name in self._accumulated]
        )

    def update_trials(self, rates: Mapping[str, float]) -> dict[str, Update]:
        """Clip each named trial's gradient by its own norm and take its AdamW step. A collective.

        All others stay as they are, to the bit: weights, moments and step counts; so does a named one whose norm is not
        finite.

        Args:
            rates: learning rates by trial; of trials that were active when gradients were accumulated.

        Returns:
            The update of each named trial; ``grad_norm`` is infinite where it was not finite.
        """
        idle = set(rates) - set(self._accumulated)
        assert not idle, f"{', '.join(sorted(idle))}: no gradient was accumulated"
        gradients, updates = self._reduced_gradients(), {}
        norms = self._norms(gradients)
        for name, group, own, norm in zip(self.configs, self._adam.param_groups, gradients, norms, strict=True):
            limit = self.configs[name].optim.max_grad_norm
            takes_step = name in rates and math.isfinite(norm)
            group["takes_step"] = takes_step
            if takes_step:
                group["lr"] = rates[name]
                group["gradient_scale"] = min(1.0, limit / (norm + 1e-6)) if limit else 1.0
                updates[name] = Update(norm, True, group["gradient_scale"])
                continue
            if name in rates:
                updates[name] = Update(math.inf, False)
            for gradient in own:  # DeepSpeed leaves the whole step out where any is not finite
                gradient.zero_()
        self.deepspeed.step()
        assert not (self.zero_stage and compat.step_was_skipped(self.optimizer)), "every gradient left was finite"
        self._accumulated = ()
        return {name: updates[name] for name in rates}

    def _reduced_gradients(self) -> list[list[Tensor]]:
        """Return this rank's share of the reduced gradients of each trial."""
        if self.zero_stage:
            return reduced_gradients(self.optimizer, self.zero_stage, len(self.configs))
        return [[p.grad for p in own.values() if p.grad is not None] for own in self.parameters.values()]

    def _norms(self, gradients: list[list[Tensor]]) -> list[float]:
        """Return each trial's norm over all ranks, computed in fp32: one small all-reduce, one wait for the device."""
        norms = [torch.nn.utils.get_total_norm([g.float() for g in own]).to(self.world.device) for own in gradients]
        if self.zero_stage == 0:  # every rank has all of them
            return torch.stack(norms).tolist()
        return [math.sqrt(square) for square in sum_over_ranks(torch.stack(norms).square(), self.world.device)]

    def rebuild(self, names: Iterable[str]) -> None:
        """Keep these trials only, each as it is to the bit, and free what the others have taken. A collective.

        Between an update and the next forward: gradients are dropped. All that are kept are active then; their views
        stay good.
        """
        kept = {name: self.configs[name] for name in self.configs if name in set(names)}
        saved = {name: copy_shares(self.optimizer, self.zero_stage, self.shares_of(name)) for name in kept}
        self._detach()
        self.model.set_adapter(next(iter(kept)))  # PEFT's own active adapter must be one that stays
        for name in set(self.configs) - set(kept):
            self.model.delete_adapter(name)
            del self.runtimes[name]
        self.configs = kept
        self.active.names = tuple(kept)
        for name in kept:  # PEFT lets its active adapter alone be trained
            for parameter in trial_parameters(self.model, name).values():
                parameter.requires_grad_(True)
        self.trainable_params = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._begin()
        for name, copies in saved.items():
            write_shares(self.optimizer, self.zero_stage, self.shares_of(name), copies)

    def _detach(self) -> None:
        """Part the model from DeepSpeed; under stage 3 its parameters stay partitioned."""
        compat.detach(self.deepspeed, self.zero_stage)
        vars(self.optimizer).clear()
        if self.zero_stage < 3:
            for parameter in self.trainable_params.values():
                vars(parameter).clear()
