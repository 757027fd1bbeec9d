"""Compile a model's decoder layers with torch.compile, each by itself (regional compilation)."""

from __future__ import annotations

from typing import Any

from trainer.compat.torch import uncompile_module
from trainer.kernels.patch import Patch
from trainer.models.first_layers import find_decoder_layers


def compile_layers(model: Any) -> Patch | None:
    """Compile the decoder layers for any shape, one graph for all of a kind; return the patch, applied.

    Layers of one kind share their code, so the compilation of one serves all. No two tries have the same shape, so
    shapes are symbols. ``None`` where no list of layers is found.
    """
    if (stack := find_decoder_layers(model)) is None:
        return None
    layers = list(stack[2])

    def apply() -> None:
        for layer in layers:
            layer.compile(dynamic=True)

    def undo() -> None:
        for layer in layers:
            uncompile_module(layer)

    apply()
    return Patch(apply, undo)
