"""Verify at start-up, on the loaded model and real rows, that trials in one forward do not touch each other."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from trainer.compat.bitsandbytes import is_4bit
from trainer.config.schema import TrainConfig
from trainer.data.batching.micro_batch import MicroBatch
from trainer.data.batching.packing import Packing
from trainer.data.batching.rank_split import Limits
from trainer.data.run_data import Data
from trainer.engine.verification import Result, Verification, distances, in_fp32, loss_and_gradients
from trainer.engine.verification_rows import smallest_window, verification_rows
from trainer.engine.verify_kernels import MAX_FP32_PARAMETERS
from trainer.kernels.label_loss import LabelLoss
from trainer.kernels.patch import Patch
from trainer.kernels.trial_lora import ActiveTrials
from trainer.kernels.trie_attention import trie_context
from trainer.methods.parameters import trial_parameters
from trainer.models.first_layers import first_layers


def verify_together(
    model: Any, loss: LabelLoss, config: TrainConfig, data: Data, packing: Packing, patch: Patch, active: ActiveTrials
) -> Verification:
    """Compare the last trial of a forward of all of them with that trial alone, in PEFT's own layers.

    It is the last one whose rows would be mistaken: layers that sort or choose tokens (experts that are modules) would
    give it rows of the others.

    Args:
        model: with an adapter a trial, patched, before DeepSpeed; dropout is off.
        loss: of this model.
        config: of any of the trials.
        data: the first step's rows are what it is verified on.
        packing: that was chosen.
        patch: of the LoRA layers.
        active: what they read.
    """
    rows = verification_rows(config, data, smallest_window(model))[0]
    with first_layers(model), _exactly(model):
        batch = _collate(packing, rows).to(next(model.parameters()).device)
        last = active.names[-1]
        compared = [p for p in trial_parameters(model, last).values() if p.requires_grad]
        was_training = model.training
        model.eval()
        try:
            found = _together(model, loss, batch, len(active.names), compared)
        except (AssertionError, RuntimeError) as error:  # a layer that does not keep the rows apart
            return Verification(
                0.0, 0.0, torch.float32, None, f"{type(error).__name__}: {' '.join(str(error).split())}"
            )
        finally:
            model.train(was_training)
        expected = _alone(model, loss, batch, last, patch, compared)
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return Verification(*distances(found, expected), dtype)


def _collate(packing: Packing, rows: Sequence[Any]) -> MicroBatch:
    whole = Packing(packing.uses_trie, Limits(len(rows), 0), packing.pad_id, in_pieces=packing.in_pieces)
    return whole.collate(rows, range(len(rows)))


def _together(model: Any, loss: LabelLoss, batch: MicroBatch, trials: int, compared: list[nn.Parameter]) -> Result:
    with trie_context(batch.paths, trials=trials):
        value = loss(model, batch, trials=trials)[-1]
        gradients = torch.autograd.grad(value, compared, allow_unused=True)
    held = [torch.zeros_like(p, dtype=torch.float32) for p in compared]
    for own, gradient in zip(held, gradients, strict=True):
        if gradient is not None:
            own += gradient
    return value.detach().cpu(), held


def _alone(
    model: Any, loss: LabelLoss, batch: MicroBatch, name: str, patch: Patch, compared: list[nn.Parameter]
) -> Result:
    """Return the loss and gradients of one trial, without our layers."""
    before, trained = model.active_adapter, [p for p in model.parameters() if p.requires_grad]
    was_training = model.training
    patch.undo()
    model.set_adapter(name)
    model.eval()
    try:
        return loss_and_gradients(model, loss, [batch], compared)
    finally:
        model.train(was_training)
        model.set_adapter(before)
        for parameter in trained:  # PEFT lets its active adapter alone be trained
            parameter.requires_grad_(True)
        patch.apply()


def _exactly(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Compute in fp32 where nothing is quantised and there is memory for it: it tells a mistake from rounding."""
    parameters = list(model.parameters())
    plain = all(p.is_floating_point() and not is_4bit(p) for p in parameters)
    is_small = sum(p.numel() for p in parameters) <= MAX_FP32_PARAMETERS
    return in_fp32(model) if plain and is_small else contextlib.nullcontext()
