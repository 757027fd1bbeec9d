"""Find the text part of a multimodal model: what is trained, counted and verified; its other parts see no row of text.

A wrapper holds a decoder beside a vision tower (or an audio tower) and what projects from there. The text part is the
decoder and the output layer. Of a model without towers it is the model itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from trainer.methods.parameters import count_weights


def is_wrapper(model: Any) -> bool:
    """Return whether a model, wrapped by PEFT or not, has parts that rows of text do not run through."""
    if model.config.get_text_config() is model.config:
        return False
    return getattr(model.get_decoder(), "config", model.config) is not model.config


def text_modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of the text part by their full names, in the model's order; of a model without towers all."""
    if not is_wrapper(model):
        yield from model.named_modules()
        return
    inside = _text_ids(model)
    yield from ((name, module) for name, module in model.named_modules() if id(module) in inside)


def text_parameters(model: Any) -> dict[str, nn.Parameter]:
    """Return the parameters of the text part by their names in the model, in its order; what is tied once."""
    if not is_wrapper(model):
        return dict(model.named_parameters())
    own = {id(p) for _, module in text_modules(model) for p in module.parameters(recurse=False)}
    return {name: p for name, p in model.named_parameters() if id(p) in own}


def other_parts(model: Any) -> dict[str, nn.Module]:
    """Return the outermost modules that hold nothing of the text part, with weights, by their full names."""
    if not is_wrapper(model):
        return {}
    inside = _text_ids(model)
    above = {id(m) for m in model.modules() if any(id(part) in inside for part in m.modules())}
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        is_outermost = id(module) not in above and id(model.get_submodule(parent)) in above
        if is_outermost and next(module.parameters(), None) is not None:
            found[name] = module
    return found


def other_parts_pattern(model: Any) -> str | None:
    """Return the regular expression of full names that PEFT is told to pass over (``exclude_modules``); ``None`` for a
    model without towers."""
    names = list(other_parts(model))
    if not names:
        return None
    return f"({'|'.join(map(re.escape, names))})(\\..*)?"


def train_text_part(model: nn.Module) -> nn.Module:
    """Make all weights of the text part trainable, and freeze the others."""
    if not is_wrapper(model):
        return model.requires_grad_(True)
    model.requires_grad_(False)
    for parameter in text_parameters(model).values():
        parameter.requires_grad_(True)
    return model


def describe_frozen_parts(model: Any) -> str | None:
    """Return a sentence for the user where a model has parts that rows of text do not train; else nothing."""
    parts = other_parts(model)
    if not parts:
        return None
    count = sum(count_weights(p) for part in parts.values() for p in part.parameters())
    names = ", ".join(name.rpartition(".")[2] for name in parts)
    return f"text part of {type(model).__name__}: {names} ({count:,} weights) see no text and stay as they are"


def _text_ids(model: Any) -> set[int]:
    """Return the ids of the modules of the decoder and of the output layer."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    return {id(module) for part in (decoder, head) if part is not None for module in part.modules()}
