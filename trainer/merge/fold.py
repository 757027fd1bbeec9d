"""Fold adapters into the weights that they stand beside: layer by layer in fp32, each verified on random inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from trainer.compat.peft import adapted_parameter_product, is_adapted_parameter, trained_token_ids
from trainer.errors import CheckpointError
from trainer.tracking.counter import ProgressCounter

PROBES = 8  # random inputs a layer, as wide as its own; of an embedding so many times more ids
# How far the folded layer's outputs may be from the live layer's, both in fp32: so much of the outputs, and so much of
# what the adapter does to them. When all is right the order of sums is left: 3e-7 of the outputs (576 wide) to 8e-7
# (14336 wide) were measured, by LoRA, DoRA, AdaLoRA and IA3. A scale that is off by 1 % is found wherever the adapter
# moves the outputs by more than 4e-4 of themselves; rounding the weights to bf16 alone moves them by 1e-3.
OUTPUT_TOLERANCE, EFFECT_TOLERANCE = 3e-6, 1e-3


def fold(model: Any) -> tuple[nn.Module, int]:
    """Fold the adapters of stock PEFT's wrapper into its base, and take the wrapper off.

    Each weight is changed where it lies, and rounded once: memory grows by one layer in fp32, and a weight that is
    mapped from a file becomes this process's own page by page.

    Returns:
        The plain model, and how many layers were folded.

    Raises:
        CheckpointError: a folded layer does not do what it did with its adapter, or its weights are not finite.
    """
    assert isinstance(model, PeftModel)
    _untie(model)
    layers = [
        (name.removeprefix("base_model.model."), layer)
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer)
    ]
    _check_shared(layers)
    with torch.no_grad(), ProgressCounter("folding", len(layers), "layers") as counter:
        for name, layer in counter.over(layers):
            _fold_layer(name, layer)
    plain: nn.Module = model.base_model.unload()
    assert not any(isinstance(layer, BaseTunerLayer) for layer in plain.modules()), "an adapter is left"
    return plain, len(layers)


def _check_shared(layers: Sequence[tuple[str, Any]]) -> None:
    """Refuse layers that share one weight and have an adapter each: it cannot take up both. Trained rows of tied
    embeddings are one adapter in two places."""
    first: dict[int, str] = {}
    for name, layer in layers:
        weight = getattr(layer.get_base_layer(), "weight", None)
        other = name if weight is None else first.setdefault(id(weight), name)
        if other != name and not is_adapted_parameter(layer) and not trained_token_ids(layer):
            reason = f"has the same weight as {other}, each has an adapter of its own, and a weight takes up only one"
            raise CheckpointError(name, reason=reason, hint="serve the adapter beside the base")


def _fold_layer(name: str, layer: Any) -> None:
    stored = [(p, p.data) for p in layer.parameters() if p.is_floating_point()]
    for parameter, own in stored:
        parameter.data = own.float()
    base, probe = layer.get_base_layer(), _random_inputs(layer)
    before, live = _outputs(layer, base, probe), _outputs(layer, layer, probe)
    layer.merge()
    _check_fold(name, before, live, _outputs(layer, base, probe))
    for parameter, own in stored:
        own.copy_(parameter.data)
        parameter.data = own
        if not torch.isfinite(own).all():
            reason = f"with its adapter holds values that {str(own.dtype).removeprefix('torch.')} has no room for"
            raise CheckpointError(name, reason=reason, hint="model.dtype=bf16, or serve the adapter beside the base")


def _random_inputs(layer: Any) -> Tensor:
    """Return random inputs, which every part of the weights has an effect on."""
    draw = torch.Generator().manual_seed(0)
    base = layer.get_base_layer()
    if is_adapted_parameter(layer):
        shape, device = layer.get_param().shape, layer.get_param().device
        return torch.randn(shape[-1], PROBES, generator=draw).to(device)
    if isinstance(base, nn.Embedding):
        drawn = torch.randint(len(base.weight), (32 * PROBES,), generator=draw)
        return torch.cat([drawn, torch.tensor(trained_token_ids(layer), dtype=torch.long)]).to(base.weight.device)
    return torch.randn(PROBES, layer.in_features, generator=draw).to(base.weight.device)


def _outputs(layer: Any, part: Any, probe: Tensor) -> Tensor:
    """Return the probe's outputs of the layer with its adapter, or of its base alone.

    A parameter of more than two dimensions (experts) has no forward of its own: its products with the probe.
    """
    if not is_adapted_parameter(layer):
        return part(probe).clone()
    if part is not layer:
        return layer.get_param() @ probe
    product: Tensor = adapted_parameter_product(layer, probe)
    return product


def _check_fold(name: str, before: Tensor, live: Tensor, folded: Tensor) -> None:
    distance, effect = float((folded - live).norm()), float((live - before).norm())
    bound = OUTPUT_TOLERANCE * max(float(before.norm()), float(live.norm())) + EFFECT_TOLERANCE * effect
    if not distance <= bound:
        raise CheckpointError(
            name,
            reason=f"folded, it is {distance / max(effect, 1e-30):.1e} of what its adapter does from the layer with "
            f"its adapter, in fp32 on random inputs; {bound / max(effect, 1e-30):.1e} is allowed",
            hint="serve the adapter beside the base",
        )


def _untie(model: Any) -> None:
    """Untie an adapted embedding from the output layer, which must not change with it."""
    base = model.get_base_model()
    inner, outer = base.get_input_embeddings(), base.get_output_embeddings()
    if outer is None or not any(isinstance(layer, BaseTunerLayer) for layer in (inner, outer)):
        return
    shared = [layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer for layer in (inner, outer)]
    if shared[0].weight is shared[1].weight:
        shared[1].weight = nn.Parameter(shared[1].weight.detach().clone())
        for config in (base.config, base.config.get_text_config()):  # some wrappers take it from their text part's
            config.tie_word_embeddings = False
