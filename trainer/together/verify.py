"""Verify at start-up, on the loaded model and real rows, that trials in one forward do not touch each other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from trainer.config.schema import TrainConfig
from trainer.data.batching.packing import Packing
from trainer.data.batching.rank_split import Limits
from trainer.data.run_data import Data
from trainer.engine.verification import Verification, distances, in_fp32, loss_and_gradients
from trainer.engine.verification_rows import smallest_window, verification_rows
from trainer.engine.verify_kernels import fits_in_fp32
from trainer.kernels.label_loss import LabelLoss
from trainer.kernels.patch import Patch
from trainer.kernels.trial_lora import ActiveTrials
from trainer.methods.parameters import trial_parameters
from trainer.models.first_layers import find_decoder_layers, first_layers


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
    whole = replace(packing, limits=Limits(len(rows), 0))
    last, was_training = active.names[-1], model.training
    # rows of all trials through all layers would be the most memory that a small model's training ever takes
    above = 0 if _adapts_every_layer(model, last) else None
    with first_layers(model, above), in_fp32(model) if fits_in_fp32(model) else contextlib.nullcontext():
        batches = [whole.collate(rows, range(len(rows))).to(next(model.parameters()).device)]
        compared = [p for p in trial_parameters(model, last).values() if p.requires_grad]
        model.eval()
        try:
            with active.on_same_tokens():
                found = loss_and_gradients(model, loss, batches, compared, len(active.names), active.shares_layers)
            with _alone(model, last, patch):
                expected = loss_and_gradients(model, loss, batches, compared)
        except (AssertionError, IndexError, RuntimeError, ValueError) as error:  # a layer does not keep the rows apart
            if isinstance(error, torch.OutOfMemoryError):
                raise
            message = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return Verification(0.0, 0.0, torch.float32, None, message)
        finally:
            model.train(was_training)
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return Verification(*distances(found, expected), dtype)


def _adapts_every_layer(model: Any, name: str) -> bool:
    stack = find_decoder_layers(model)
    layers: Iterable[nn.Module] = stack[2] if stack else ()
    return all(any(isinstance(m, LoraLayer) and name in m.lora_A for m in layer.modules()) for layer in layers)


@contextlib.contextmanager
def _alone(model: Any, name: str, patch: Patch) -> Iterator[None]:
    """Let a model be that of one trial inside the ``with`` block, without our layers."""
    before, trained = model.active_adapter, [p for p in model.parameters() if p.requires_grad]
    patch.undo()
    model.set_adapter(name)
    try:
        yield
    finally:
        model.set_adapter(before)
        for parameter in trained:  # PEFT lets its active adapter alone be trained
            parameter.requires_grad_(True)
        patch.apply()
