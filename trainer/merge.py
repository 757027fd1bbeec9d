"""A merge that is proved: adapter into base, written, read back from disk, compared with the live adapter, or deleted.

Host memory holds one model at a time: the live one answers and is merged in place, layer by layer in fp32; it is let go
before the merged one is read back.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from trainer.config.method import METHODS
from trainer.config.schema import TrainConfig
from trainer.errors import CheckpointError
from trainer.resources import give_back_memory

SHARD = "2GB"  # of weights a file
# Relative distance (Frobenius) of all logits. In fp32 what is left is the order of sums; in 16 bits each merged weight
# is rounded once, where the live adapter adds its own small output to the base's.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
NOT_MERGEABLE = {
    "bottleneck": "its layers are not linear, and no weight of the base can do what they do",
    "prompt": "its virtual tokens stand before the rows, and no weight of the base can do what they do",
    "prefix": "its keys and values stand before the rows, and no weight of the base can do what they do",
    "full": "there is no adapter: the folder model/ of the run is the trained model",
}


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge was found to be.

    Attributes:
        distance: relative distance of the logits, merged from disk against live on the base in 16 bits.
        bound: what was allowed.
        same_choice: share of positions at which both find the same token likeliest.
        trained_distance: the same against the live adapter on the base as it was trained on, when that was quantised.
        prompts: how many were answered.
    """

    distance: float
    bound: float
    same_choice: float
    prompts: int
    trained_distance: float | None = None


def check_mergeable(config: TrainConfig) -> None:
    """Raise a :class:`CheckpointError` for a method that cannot be merged, before anything is loaded."""
    if (why := NOT_MERGEABLE.get(config.method.name)) is not None:
        title = METHODS[config.method.name].title
        cure = "use the folder as it is" if config.method.name == "full" else "serve the adapter beside the base"
        raise CheckpointError("run", value=title, rule=f"cannot be merged: {why}", cure=cure)


def answers(model: Any, prompts: Sequence[list[int]]) -> list[Tensor]:
    """Logits of every position of every prompt, fp32 on the CPU, (tokens, vocabulary)."""
    device = next(model.parameters()).device
    with torch.no_grad():
        return [
            model(input_ids=torch.tensor([prompt], device=device), use_cache=False).logits[0].float().cpu()
            for prompt in prompts
        ]


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[float, float]:
    """Relative Frobenius distance of all logits put together; share of positions with the same likeliest token."""
    apart = sum(float((f - e).square().sum()) for f, e in zip(found, expected, strict=True))
    whole = sum(float(e.square().sum()) for e in expected)
    same = sum(int((f.argmax(-1) == e.argmax(-1)).sum()) for f, e in zip(found, expected, strict=True))
    value = (apart / max(whole, 1e-30)) ** 0.5
    return (value if value == value else float("inf")), same / sum(len(e) for e in expected)


def merge_in_place(model: Any) -> nn.Module:
    """Fold the adapters of stock PEFT's wrapper into its base, each layer in fp32, and take the wrapper off."""
    assert isinstance(model, PeftModel)
    _untie(model)
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            _merge_layer(layer)
    return model.base_model.unload()


def _merge_layer(layer: Any) -> None:
    """In fp32, so that each weight is rounded once."""
    base = layer.get_base_layer()
    dtype = base.weight.dtype
    held = [p for p in layer.parameters() if p.is_floating_point()]
    for parameter in held:
        parameter.data = parameter.data.float()
    layer.merge(safe_merge=True)
    for parameter in held:
        parameter.data = parameter.data.to(dtype)
    base.weight.data = base.weight.data.to(dtype)
    if getattr(base, "bias", None) is not None:
        base.bias.data = base.bias.data.to(dtype)


def _untie(model: Any) -> None:
    """An adapted embedding must not take the output layer along that it shares its weights with."""
    base = model.get_base_model()
    inner, outer = base.get_input_embeddings(), base.get_output_embeddings()
    if outer is None or not any(isinstance(layer, BaseTunerLayer) for layer in (inner, outer)):
        return
    shared = [layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer for layer in (inner, outer)]
    if shared[0].weight is shared[1].weight:
        shared[1].weight = nn.Parameter(shared[1].weight.detach().clone())
        base.config.tie_word_embeddings = False


def merge(
    load_live: Callable[[], Any],
    tokenizer: Any,
    prompts: Sequence[list[int]],
    to: Path,
    reload: Callable[[Path, torch.dtype], Any],
    card: Callable[[Merged], str],
    trained: Sequence[Tensor] | None = None,
    fold: Callable[[Any], nn.Module] = merge_in_place,
) -> Merged:
    """Merge, write, read back, compare; what does not compare is deleted.

    Args:
        load_live: loads the base with its adapter; loaded here, so that its memory can go again.
        tokenizer: saved with the model, with its chat template.
        prompts: real ones, as token ids.
        to: the folder that is made; it must not be there.
        reload: reads the merged model from a folder, in a dtype.
        card: the model card, as Markdown.
        trained: logits of the live adapter on the quantised base it was trained on.
        fold: how the adapter is folded in.

    Raises:
        CheckpointError: the merged model answers otherwise than the live one, or ``to`` is there already.
    """
    if to.exists():
        raise CheckpointError(str(to), rule="is there already", cure="another folder")
    model = load_live()
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    expected = answers(model, prompts)
    merged = fold(model)
    del model
    partial = to.with_name(to.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    merged.config.use_cache = True
    merged.save_pretrained(str(partial), max_shard_size=SHARD)
    tokenizer.save_pretrained(str(partial))
    del merged
    gc.collect()
    give_back_memory(torch.device("cpu"))
    again = reload(partial, dtype)
    found = answers(again, prompts)
    apart, same = distance(found, expected)
    bound = BOUNDS[dtype]
    from_trained = None if trained is None else distance(found, trained)[0]
    result = Merged(apart, bound, same, len(prompts), from_trained)
    if not apart <= bound:
        shutil.rmtree(partial)
        raise CheckpointError(
            str(to),
            rule=f"the merged model's logits are {apart:.1e} from the live adapter's, {bound:.1e} is allowed; deleted",
            cure="model.dtype=fp32, or serve the adapter beside the base",
        )
    (partial / "README.md").write_text(card(result))
    partial.rename(to)
    return result
