"""A merge that is proved: adapter into base, written, read back from disk, compared with the live adapter, or deleted.

Three proofs, from the sharpest to the widest. Each folded layer does in fp32 what it did with its adapter (``fold``).
What is read back from disk is to the bit what was folded. And the merged model answers real prompts as the live one
did, which holds the configuration to account too, and whatever else makes a model of its weights.

Host memory holds one model at a time: the live one answers and is folded where it lies; it is let go before the merged
one is read back. Logits are kept of some positions only: with a large vocabulary they would outweigh a small model.
"""

from __future__ import annotations

import gc
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from trainer.config.method import METHODS
from trainer.config.schema import TrainConfig
from trainer.engine.meter import give_back_memory
from trainer.errors import CheckpointError
from trainer.files import commit_folder, partial_folder
from trainer.merge.fold import fold

SHARD = "2GB"  # of weights a file
POSITIONS = 32  # of each prompt whose logits are compared; all its tokens have a part in them
# Relative distance (Frobenius) of all logits. In fp32 what is left is the order of sums; in 16 bits each merged weight
# is rounded once, where the live adapter adds its own small output to the base's.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# Where the adapter moves the logits by more than rounding may, the merged model must be nearer to the live one than the
# base is by this factor. In bf16 any change of a weight, however small, moves the logits by 2e-2 to 3e-2 (SmolLM2-135M,
# adapters of every strength; a random Llama of 22 layers): a right merge then has at most 0.6 of the base's distance,
# one that left the adapter out all of it. An adapter that moves them less is told from the base by the other proofs.
NEARER = 0.7
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
        base_distance: the same for the base without the adapter against live: what the adapter does.
        same_choice: share of positions at which both find the same token likeliest.
        prompts: how many were answered.
        layers: how many were folded, each proved in fp32.
        tensors: how many were read back from disk and were to the bit what was folded.
        trained_distance: merged against the live adapter on the base as it was trained on, when that was quantised.
    """

    distance: float
    bound: float
    base_distance: float
    same_choice: float
    prompts: int
    layers: int
    tensors: int
    trained_distance: float | None = None


def check_mergeable(config: TrainConfig) -> None:
    """Raise a :class:`CheckpointError` for a method that cannot be merged, before anything is loaded."""
    if (why := NOT_MERGEABLE.get(config.method.name)) is not None:
        title = METHODS[config.method.name].title
        hint = "use the folder as it is" if config.method.name == "full" else "serve the adapter beside the base"
        raise CheckpointError("run", value=title, reason=f"cannot be merged: {why}", hint=hint)


def answers(model: Any, prompts: Sequence[list[int]]) -> list[Tensor]:
    """Logits of up to POSITIONS positions of every prompt, evenly spread, the last one with them.

    Returns:
        for each prompt (positions, vocabulary) on the CPU, in the model's own dtype: nothing is lost, and no memory.
    """
    device = next(model.parameters()).device
    found = []
    with torch.no_grad():
        for prompt in prompts:
            logits = model(input_ids=torch.tensor([prompt], device=device), use_cache=False).logits[0]
            spread = torch.linspace(0, len(prompt) - 1, min(POSITIONS, len(prompt)), device=device)
            found.append(logits[spread.round().long()].cpu())
    return found


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[float, float]:
    """Relative Frobenius distance of all logits put together; share of positions with the same likeliest token."""
    apart = whole = 0.0
    same = count = 0
    for one, other in zip(found, expected, strict=True):
        apart += float((one.float() - other.float()).square().sum())
        whole += float(other.float().square().sum())
        same, count = same + int((one.argmax(-1) == other.argmax(-1)).sum()), count + len(one)
    value = (apart / max(whole, 1e-30)) ** 0.5
    return (value if value == value else float("inf")), same / count


def digests(model: nn.Module) -> dict[str, str]:
    """A digest of each tensor's dtype, shape and bits, by its name in the state dict."""

    def digest(tensor: Tensor) -> str:
        raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"

    state = model.state_dict()
    with ThreadPoolExecutor() as pool:  # hashlib lets go of the interpreter
        return dict(zip(state, pool.map(digest, state.values()), strict=True))


def bytes_held(model: nn.Module) -> Counter[torch.dtype]:
    """Bytes of the state dict by dtype, what is tied counted once."""
    own = {(t.data_ptr(), t.shape): t for t in model.state_dict().values() if t.numel()}
    return _bytes(own.values())


def bytes_written(folder: Path) -> Counter[torch.dtype]:
    """Bytes of weights in a folder's safetensors, by dtype."""
    found: Counter[torch.dtype] = Counter()
    for shard in folder.glob("*.safetensors"):
        with safe_open(str(shard), framework="pt") as file:
            found += _bytes(file.get_tensor(name) for name in file.keys())  # noqa: SIM118  it is no dict
    return found


def _bytes(tensors: Any) -> Counter[torch.dtype]:
    found: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        found[tensor.dtype] += tensor.nbytes
    return found


def merge(
    load_live: Callable[[], Any],
    tokenizer: Any,
    prompts: Sequence[list[int]],
    to: Path,
    reload: Callable[[Path, torch.dtype], Any],
    card: Callable[[Merged], str],
    trained: Sequence[Tensor] | None = None,
) -> Merged:
    """Merge, write, read back, compare; what does not compare is deleted.

    Args:
        load_live: loads the base with its adapter; loaded here, so that its memory can go again.
        tokenizer: saved with the model, with its chat template.
        prompts: real ones, as token ids.
        to: the folder that is made; it must not be there.
        reload: reads the merged model from a folder, in a dtype.
        card: the model card, as Markdown.
        trained: what :func:`answers` gave for the live adapter on the quantised base it was trained on.

    Raises:
        CheckpointError: a folded layer, what is on disk, or its answers are not what they were, or ``to`` is there.
    """
    if to.exists():
        raise CheckpointError(str(to), reason="is there already", hint="another folder")
    model = load_live()
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    expected = answers(model, prompts)
    with model.disable_adapter():
        of_base = distance(answers(model, prompts), expected)[0]
    folded, layers = fold(model)
    del model
    with partial_folder(to) as partial:
        known, held = digests(folded), bytes_held(folded)
        _write(folded, tokenizer, partial)
        del folded
        gc.collect()
        give_back_memory(torch.device("cpu"))
        again = reload(partial, dtype)
        _check_written(partial, again, known, held)
        found = answers(again, prompts)
        apart, same = distance(found, expected)
        allowed = _allowed(dtype, of_base)
        _check_answers(to, apart, of_base, allowed)
        from_trained = None if trained is None else distance(found, trained)[0]
        result = Merged(apart, allowed, of_base, same, len(prompts), layers, len(known), from_trained)
        (partial / "README.md").write_text(card(result))
        commit_folder(partial, to)
    return result


def _write(folded: Any, tokenizer: Any, folder: Path) -> None:
    folded.config.use_cache = True  # it is off in training
    folded.save_pretrained(str(folder), max_shard_size=SHARD)
    tokenizer.save_pretrained(str(folder))


def _check_written(folder: Path, again: nn.Module, known: dict[str, str], held: Counter[torch.dtype]) -> None:
    """Read by whoever will read it, for on disk some models name and cut their tensors otherwise; and, since a reader
    casts what has another dtype and passes over what it does not know, as many bytes of each dtype as were held."""
    found = digests(again)
    odd = sorted(name for name in known.keys() | found.keys() if known.get(name) != found.get(name))
    if odd:
        reason = f"read back from disk, {len(odd)} of {len(known)} tensors are not what was folded; deleted"
        raise CheckpointError(f"{folder.name} {odd[0]}", reason=reason, hint="check the disk")
    if (written := bytes_written(folder)) != held:
        reason = f"holds {_shown(written)} of weights, where {_shown(held)} were folded; deleted"
        raise CheckpointError(folder.name, reason=reason, hint="check the disk")


def _shown(found: Counter[torch.dtype]) -> str:
    return ", ".join(f"{count} bytes of {str(dtype).removeprefix('torch.')}" for dtype, count in found.items())


def _allowed(dtype: torch.dtype, of_base: float) -> float:
    bound = BOUNDS[dtype]
    return bound if of_base <= bound else min(bound, NEARER * of_base)


def _check_answers(to: Path, apart: float, of_base: float, allowed: float) -> None:
    if not apart <= allowed:
        reason = f"the merged model's logits are {apart:.1e} from the live adapter's, {allowed:.1e} is allowed "
        reason += f"(the base's without it are {of_base:.1e}); deleted"
        raise CheckpointError(str(to), reason=reason, hint="model.dtype=fp32, or serve the adapter beside the base")
