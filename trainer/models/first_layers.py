"""Cut a large model to its first layers for a while, so that it is cheap to verify something on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from trainer.methods import count_parameters
from trainer.methods.text_part import text_modules

# Above so many weights the first layers are tried alone: every layer of a kind runs the same code. Under ZeRO-3 the
# whole model still lies in its files then, and all of a 70B would run on the CPU. What is cut so far is often small
# enough to be tried in fp32 (``verify_kernels.MAX_FP32_PARAMETERS``), which says more than all layers in 16 bits.
MAX_WHOLE_PARAMETERS = 1_000_000_000
MIN_LAYERS = 2  # at least, so that the gradient of one flows through another


@contextlib.contextmanager
def first_layers(model: Any, above: int | None = None) -> Iterator[str]:
    """Cut a large model to its first layers, as many as hold one of each kind; put all back afterwards.

    The layers that are left out are not looked at, so their weights may stay in their files. Where none of the layers
    that are left has trainable parameters, their norms and biases are trainable for as long.

    Args:
        model: wrapped by PEFT or not.
        above: so many parameters a model is large; ``None``: above ``MAX_WHOLE_PARAMETERS``.

    Yields:
        the cut in words for the user; empty when the model is whole.
    """
    limit = MAX_WHOLE_PARAMETERS if above is None else above
    stack = find_decoder_layers(model) if count_parameters(model)[1] > limit else None
    layers = stack[2] if stack else nn.ModuleList()
    count = _count_until_each_kind(layers)
    if stack is None or count >= len(layers):
        yield ""
        return
    parent, name, _ = stack
    setattr(parent, name, nn.ModuleList(list(layers)[:count]))
    unfrozen = []
    if not any(p.requires_grad for p in model.parameters()):
        kept = (p for layer in layers[:count] for p in layer.parameters())
        unfrozen = [p.requires_grad_() for p in kept if p.dim() == 1 and p.is_floating_point()]
    try:
        yield f" and the first {count} of {len(layers)} layers"
    finally:
        setattr(parent, name, layers)
        for parameter in unfrozen:
            parameter.requires_grad_(False)


def find_decoder_layers(model: Any) -> tuple[nn.Module, str, nn.ModuleList] | None:
    """Find the list of the decoder's layers; return its parent module, its name in it, and the list."""
    count = model.config.get_text_config().num_hidden_layers
    found = [
        (parent, name, child)
        for _, parent in text_modules(model)
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    return max(found, key=lambda f: sum(p.numel() for p in f[2].parameters()), default=None)


def _count_until_each_kind(layers: nn.ModuleList) -> int:
    """Return how many of the first layers hold one of each kind: the first ones, because models look up by a layer's
    number what it is."""
    kinds = [_layer_signature(layer) for layer in layers]
    return max([MIN_LAYERS, *(kinds.index(kind) + 1 for kind in set(kinds))])


def _layer_signature(layer: nn.Module) -> tuple[Any, ...]:
    """Return what tells layers of one model apart: the model's own modules in it, with their switches and sizes (a
    window, no rotary embedding, experts). Linear layers, adapted or not, are none of its own."""
    own = ((name, m) for name, m in layer.named_modules() if type(m).__module__ == type(layer).__module__)
    return tuple(
        (name, type(m).__name__, k, v)
        for name, m in own
        for k, v in sorted(vars(m).items())
        if v is None or (isinstance(v, int | str) and "idx" not in k)
    )
