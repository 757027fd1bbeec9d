"""Compute the layers below the lowest adapted one once for all trials, where each trial's rows hold the same tokens.

Up to there the hidden states of a trial are those of every other, and no gradient goes further down. So the first layer
takes the rows of one trial out of what the model hands it, and the lowest adapted layer has them repeated. What a model
hands to its layers besides (masks, positions) is cut in the layers below, and is whole above.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trainer.kernels.patch import Patch
from trainer.kernels.trial_lora import ActiveTrials


@dataclass(frozen=True, slots=True)
class _Stack:
    """The decoder's layers, and the lowest one that each trial adapts."""

    layers: Callable[[], nn.ModuleList]
    lowest: Mapping[str, int]
    active: ActiveTrials

    def first(self) -> int:
        """Return the place of the lowest layer that one of the active trials adapts; the last layer, if none does."""
        last = len(self.layers()) - 1
        return min(last, *(self.lowest[name] for name in self.active.names))


def share_lower_layers(model: Any, parent: nn.Module, name: str, active: ActiveTrials) -> Patch | None:
    """Patch a decoder so that layers below the lowest adapted one run on the rows of one trial.

    Args:
        model: a PEFT model with a LoRA adapter of linear layers a trial; the whole of it.
        parent: of the list of the decoder's layers.
        name: of that list in it; the list may be cut for a while.
        active: looked at in each forward.

    Returns:
        the patch, applied; ``None`` where every trial adapts the first layer, or something before it.
    """
    layers = getattr(parent, name)
    lowest = lowest_adapted(model, layers)
    if max(lowest.values()) == 0:
        return None
    stack, handles = _Stack(partial(getattr, parent, name), lowest, active), list[RemovableHandle]()

    def apply() -> None:
        active.shares_layers = True
        for place, layer in enumerate(layers[: max(lowest.values()) + 1]):
            handles.append(layer.register_forward_pre_hook(partial(_hand_on, stack, place), with_kwargs=True))

    def undo() -> None:
        active.shares_layers = False
        while handles:
            handles.pop().remove()

    apply()
    return Patch(apply, undo)


def lowest_adapted(model: Any, layers: nn.ModuleList) -> dict[str, int]:
    """Return, by adapter, the place of the lowest layer that it adapts: 0 where it adapts something outside of the
    layers, but for the output layer, which comes after them."""
    place_of = {module: place for place, layer in enumerate(layers) for module in layer.modules()}
    place_of |= dict.fromkeys(model.get_output_embeddings().modules(), len(layers) - 1)
    lowest: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, LoraLayer):
            place = place_of.get(module, 0)
            for adapter in module.lora_A:
                lowest[adapter] = min(place, lowest.get(adapter, place))
    return lowest


def _hand_on(
    stack: _Stack, place: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Change what a layer gets: below the lowest adapted one the rows of one trial; that one has them of all again."""
    trials = len(stack.active.names)
    if trials == 1 or not stack.active.same_tokens or not args or not isinstance(args[0], Tensor):
        return None
    first = stack.first()
    if first == 0 or place > first:
        return None
    hidden, *others = args
    if place == first:
        return (hidden.repeat(trials, *[1] * (hidden.dim() - 1)), *others), kwargs
    rows, tokens = len(hidden) // (trials if place == 0 else 1), hidden.shape[1]
    own = partial(_own_rows, rows, (trials * rows, tokens))
    return (hidden[:rows], *map(own, others)), {key: own(value) for key, value in kwargs.items()}


def _own_rows(rows: int, whole: tuple[int, int], value: Any) -> Any:
    """Return the first rows of a tensor (rows, tokens, …) or (rows, heads, tokens, tokens), where it has them of all
    trials; anything else as it is.

    Args:
        rows: of one trial.
        whole: rows of all trials, and tokens of a row.
        value: an argument of a layer.
    """
    if type(value) is tuple:
        return tuple(_own_rows(rows, whole, one) for one in value)
    if not isinstance(value, Tensor):
        return value
    is_mask = value.dim() == 4 and (len(value), *value.shape[2:]) == (whole[0], whole[1], whole[1])
    return value[:rows] if is_mask or (value.dim() < 4 and value.shape[:2] == whole) else value
