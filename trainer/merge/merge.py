"""Merge an adapter into its base and verify it: write, read back from disk, compare with the live adapter, or delete.

Three checks, from the sharpest to the widest. Each folded layer does in fp32 what it did with its adapter (``fold``).
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

from trainer.config.method import METHODS, NOT_MERGEABLE
from trainer.config.schema import TrainConfig
from trainer.engine.device import give_back_memory
from trainer.errors import CheckpointError
from trainer.files import commit_folder, partial_folder
from trainer.merge.fold import fold
from trainer.methods.text_part import is_wrapper
from trainer.models.end_tokens import save_tokenizer
from trainer.models.processor_files import copy_processor_files
from trainer.tracking.counter import ProgressCounter

SHARD_SIZE = "2GB"  # of weights a file
MAX_POSITIONS = 32  # of each prompt whose logits are compared; all its tokens have a part in them
# Relative distance (Frobenius) of all logits. In fp32 what is left is the order of sums; in 16 bits each merged weight
# is rounded once, where the live adapter adds its own small output to the base's.
MAX_DISTANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# Where the adapter moves the logits by more than rounding may, the merged model must be nearer to the live one than the
# base is by this factor. In bf16 any change of a weight, however small, moves the logits by 2e-2 to 3e-2 (SmolLM2-135M,
# adapters of every strength; a random Llama of 22 layers): a right merge then has at most 0.6 of the base's distance,
# one that left the adapter out all of it. One that moves them less is found, if it is left out, by the other checks.
BASE_DISTANCE_FACTOR = 0.7


@dataclass(frozen=True, slots=True)
class MergeResult:
    """The figures that a merge was verified by.

    Attributes:
        distance: relative distance of the logits, merged from disk against live on the base in 16 bits.
        bound: the largest distance that is allowed.
        base_distance: the same for the base without the adapter against live: what the adapter does.
        top_token_agreement: share of positions at which both find the same token likeliest.
        prompts: how many were answered.
        layers: how many were folded, each verified in fp32.
        tensors: how many were read back from disk and were to the bit what was folded.
        training_distance: merged against the live adapter on the quantised base that it was trained on, if it was.
        is_multimodal: whether the model has towers beside its text part; they are written as they were.
    """

    distance: float
    bound: float
    base_distance: float
    top_token_agreement: float
    prompts: int
    layers: int
    tensors: int
    training_distance: float | None = None
    is_multimodal: bool = False


def check_mergeable(config: TrainConfig) -> None:
    """Raise a :class:`CheckpointError` for a method that cannot be merged, before anything is loaded."""
    if (why := NOT_MERGEABLE.get(config.method.name)) is not None:
        title = METHODS[config.method.name].title
        hint = "use the folder as it is" if config.method.name == "full" else "serve the adapter beside the base"
        raise CheckpointError("run", value=title, reason=f"cannot be merged: {why}", hint=hint)


def logits_at_positions(model: Any, prompts: Sequence[list[int]]) -> list[Tensor]:
    """Return the logits of up to MAX_POSITIONS positions of every prompt, evenly spread, the last one with them.

    Returns:
        for each prompt (positions, vocabulary) on the CPU, in the model's own dtype: nothing is lost, and no memory.
    """
    device = next(model.parameters()).device
    found = []
    with torch.no_grad(), ProgressCounter("comparing logits", len(prompts), "prompts", recurs=True) as counter:
        for prompt in counter.over(prompts):
            logits = model(input_ids=torch.tensor([prompt], device=device), use_cache=False).logits[0]
            spread = torch.linspace(0, len(prompt) - 1, min(MAX_POSITIONS, len(prompt)), device=device)
            found.append(logits[spread.round().long()].cpu())
    return found


def relative_distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[float, float]:
    """Return the relative Frobenius distance of all logits put together, and the share of positions with the same
    likeliest token."""
    difference = norm = 0.0
    same = count = 0
    for one, other in zip(found, expected, strict=True):
        difference += float((one.float() - other.float()).square().sum())
        norm += float(other.float().square().sum())
        same, count = same + int((one.argmax(-1) == other.argmax(-1)).sum()), count + len(one)
    value = (difference / max(norm, 1e-30)) ** 0.5
    return (value if value == value else float("inf")), same / count


def state_digests(model: nn.Module) -> dict[str, str]:
    """Return a digest of each tensor's dtype, shape and bits, by its name in the state dict."""

    def digest(tensor: Tensor) -> str:
        raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"

    state = model.state_dict()
    with ThreadPoolExecutor() as pool, ProgressCounter("hashing", len(state), "tensors") as counter:
        digests = pool.map(digest, state.values())  # hashlib lets go of the interpreter
        return dict(zip(state, counter.over(digests), strict=True))


def bytes_in_memory(model: nn.Module) -> Counter[torch.dtype]:
    """Return the bytes of the state dict by dtype, what is tied counted once."""
    own = {(t.data_ptr(), t.shape): t for t in model.state_dict().values() if t.numel()}
    return _bytes_by_dtype(own.values())


def bytes_on_disk(folder: Path) -> Counter[torch.dtype]:
    """Return the bytes of weights in a folder's safetensors, by dtype."""
    found: Counter[torch.dtype] = Counter()
    for shard in folder.glob("*.safetensors"):
        with safe_open(str(shard), framework="pt") as file:
            found += _bytes_by_dtype(file.get_tensor(name) for name in file.keys())  # noqa: SIM118  it is no dict
    return found


def _bytes_by_dtype(tensors: Any) -> Counter[torch.dtype]:
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
    card: Callable[[MergeResult], str],
    reference_logits: Sequence[Tensor] | None = None,
    end_ids: Sequence[int] = (),
    revision: str | None = None,
) -> MergeResult:
    """Merge, write, read back and compare; delete what does not compare.

    Args:
        load_live: loads the base with its adapter; loaded here, so that its memory can go again.
        tokenizer: saved with the model, with its chat template.
        prompts: real ones, as token ids.
        to: the folder that is made; it must not be there.
        reload: reads the merged model from a folder, in a dtype.
        card: the model card, as Markdown.
        reference_logits: what :func:`logits_at_positions` gave for the live adapter on the quantised base that
            it was trained on.
        end_ids: token ids that end an answer, saved with the model.
        revision: of a base from the hub, whose processor's files are copied where it is multimodal.

    Raises:
        CheckpointError: a folded layer, what is on disk, or its logits are not what they were, or ``to`` is there.
    """
    if to.exists():
        raise CheckpointError(str(to), reason="is there already", hint="another folder")
    model = load_live()
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    expected = logits_at_positions(model, prompts)
    with model.disable_adapter():
        base_distance = relative_distance(logits_at_positions(model, prompts), expected)[0]
    folded, layers = fold(model)
    del model
    with partial_folder(to) as partial:
        known, held = state_digests(folded), bytes_in_memory(folded)
        _write(folded, tokenizer, partial, end_ids, revision)
        is_multimodal = is_wrapper(folded)
        del folded
        gc.collect()
        give_back_memory(torch.device("cpu"))
        again = reload(partial, dtype)
        _check_written(partial, again, known, held)
        found = logits_at_positions(again, prompts)
        distance, agreement = relative_distance(found, expected)
        bound = _distance_bound(dtype, base_distance)
        _check_logits(to, distance, base_distance, bound)
        training_distance = None if reference_logits is None else relative_distance(found, reference_logits)[0]
        figures = (distance, bound, base_distance, agreement, len(prompts), layers, len(known))
        result = MergeResult(*figures, training_distance, is_multimodal)
        (partial / "README.md").write_text(card(result))
        commit_folder(partial, to)
    return result


def _write(folded: Any, tokenizer: Any, folder: Path, end_ids: Sequence[int], revision: str | None) -> None:
    folded.config.get_text_config().use_cache = True  # it is off in training
    with ProgressCounter("writing the merged model"):
        folded.save_pretrained(str(folder), max_shard_size=SHARD_SIZE)
    save_tokenizer(tokenizer, folder, end_ids, getattr(folded, "generation_config", None))
    copy_processor_files(folded, folder, revision)


def _check_written(folder: Path, again: nn.Module, known: dict[str, str], held: Counter[torch.dtype]) -> None:
    """Compare what is on disk with what was folded: the tensors as read by transformers, for on disk some models name
    and cut them otherwise; and, since a reader casts what has another dtype and passes over what it does not know, the
    bytes of each dtype."""
    found = state_digests(again)
    odd = sorted(name for name in known.keys() | found.keys() if known.get(name) != found.get(name))
    if odd:
        reason = f"read back from disk, {len(odd)} of {len(known)} tensors are not what was folded; deleted"
        raise CheckpointError(f"{folder.name} {odd[0]}", reason=reason, hint="check the disk")
    if (written := bytes_on_disk(folder)) != held:
        reason = f"holds {_describe_bytes(written)} of weights, where {_describe_bytes(held)} were folded; deleted"
        raise CheckpointError(folder.name, reason=reason, hint="check the disk")


def _describe_bytes(found: Counter[torch.dtype]) -> str:
    return ", ".join(f"{count} bytes of {str(dtype).removeprefix('torch.')}" for dtype, count in found.items())


def _distance_bound(dtype: torch.dtype, base_distance: float) -> float:
    bound = MAX_DISTANCE[dtype]
    return bound if base_distance <= bound else min(bound, BASE_DISTANCE_FACTOR * base_distance)


def _check_logits(to: Path, distance: float, base_distance: float, bound: float) -> None:
    if not distance <= bound:
        reason = f"the merged model's logits are {distance:.1e} from the live adapter's, {bound:.1e} is allowed "
        reason += f"(the base's without it are {base_distance:.1e}); deleted"
        raise CheckpointError(str(to), reason=reason, hint="model.dtype=fp32, or serve the adapter beside the base")
