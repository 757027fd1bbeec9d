"""Run a method's own work around updates, in checkpoints and at the end.

Most methods have none: their adapters are parameters like any other. The loop, the engine and the checkpointer call the
hooks of :class:`MethodRuntime` and know no method by name; what a method needs more is a subclass in ``registry``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainer.config.method import MethodConfig
from trainer.methods.base_record import BaseRecord
from trainer.methods.initial_weights import copy_initial_weights
from trainer.methods.parameters import digests, trainable_parameters
from trainer.methods.save import save_adapter, save_full


class WholeTensors(Protocol):
    """The trainable parameters as whole fp32 tensors by name, whatever ZeRO has made of them.

    Each method but ``names`` and ``shape`` is a collective: every rank calls it, and every rank gets the same.
    """

    device: torch.device

    def names(self) -> Iterable[str]:
        """Names of the trainable parameters, in the model's order."""

    def shape(self, name: str) -> torch.Size:
        """Return the whole shape of a parameter."""

    def weight(self, name: str) -> Tensor:
        """Return the fp32 master of a parameter."""

    def gradient(self, name: str) -> Tensor:
        """Return the reduced gradient, between the backward and the update: not clipped, and times the loss scale."""

    def set_weight(self, name: str, value: Tensor) -> None:
        """Overwrite a parameter: its master, and the copy that the forward uses."""


class MethodRuntime:
    """What a method does in a run besides its parameters; this base is what most methods need.

    Made on the model with its adapters, before DeepSpeed wraps it (hooks on modules must stand before DeepSpeed's).

    Args:
        model: with its trainable parameters attached.
        method: the ``method`` group.

    Attributes:
        initial_weights: A and B as they were attached, where their product was taken out of the base (PiSSA, OLoRA);
            else empty.
        base: which model the adapters belong to, written beside them; ``None`` where nobody has said.
    """

    trains_base_weights = False
    """Whether the base's own weights are trained: then gradients are too large to be whole on every rank."""
    folder_name = "adapter"
    """Of the final weights in the run folder."""

    def __init__(self, model: nn.Module, method: MethodConfig) -> None:
        self.initial_weights: dict[str, Tensor] = copy_initial_weights(model, method)
        self.base: BaseRecord | None = None
        self._initial_digests = {} if self.trains_base_weights else digests(self.trained(model))

    def trained(self, model: nn.Module) -> Mapping[str, Tensor]:
        """Return what this run trains of the model."""
        return trainable_parameters(model)

    def bind(self, tensors: WholeTensors) -> None:
        """Give access to the trainable tensors, once the engine holds them."""

    def before_backward(self, scale: float) -> None:
        """Prepare for the backward of a micro-batch. ``scale`` is what a term that counts once an update and rank is to
        be multiplied by: the loss scale in the first micro-batch of an update, 0 in the others."""

    def before_update(self, step: int) -> None:
        """Look at the gradients of the update with this number, from 1. A collective."""

    def after_update(self, step: int, gradient_scale: float | None) -> None:
        """Follow up on an update. A collective.

        Args:
            step: the update's number, from 1.
            gradient_scale: what :meth:`WholeTensors.gradient` was multiplied by to become the clipped gradient of the
                update; ``None`` when the update was skipped.
        """

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint must keep: CPU tensors by name, the same on every rank."""
        return {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over what :meth:`state` returned; every rank gets the same.

        Raises:
            CheckpointError: it is of other tensors.
        """

    def describe(self) -> str | None:
        """Return one line for the user about what the method found, at the end of a run."""
        return None

    def save(self, model: Any, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write the weights and read them back. On one rank only.

        Args:
            model: whose adapters or configuration are written; its own tensors are not looked at.
            folder: made if it is not there.
            weights: whole tensors by name: the trainable ones, or all where the base's weights are trained.

        Raises:
            CheckpointError: what was written does not read back as what was meant.
        """
        save_adapter(model, folder, weights, self.initial_weights, self.base)

    def is_untouched(self, weights: dict[str, Tensor]) -> bool:
        """Whether training has changed none of these weights."""
        return bool(self._initial_digests) and digests(weights) == self._initial_digests


class FullRuntime(MethodRuntime):
    """Full fine-tuning: a plain Hugging Face model folder takes the place of an adapter."""

    trains_base_weights = True
    folder_name = "model"

    def save(self, model: Any, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write a plain Hugging Face model folder and read it back."""
        save_full(model, folder, weights)
