"""Verify at start-up, on the loaded model and real rows, that a trie gives the loss and gradient of padded rows."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.compat.bitsandbytes import is_4bit
from trainer.compat.transformers import attention_name
from trainer.config.schema import TrainConfig
from trainer.data.batching.global_batch import global_batch
from trainer.data.batching.micro_batch import MicroBatch, Tokens
from trainer.data.batching.packing import Packing
from trainer.data.batching.rank_split import Limits
from trainer.data.batching.trie import sort_by_tokens
from trainer.data.run_data import Data
from trainer.errors import ConfigError
from trainer.kernels.label_loss import LabelLoss
from trainer.kernels.trie_attention import KERNEL, trie_context
from trainer.methods import is_prompt_learning
from trainer.models.first_layers import first_layers

KEPT = 16  # tokens before and after the fork of the two rows that are tried
BEHIND_WINDOW = 64  # tokens behind the sliding window, in the row that tries it
OTHER_TAIL = 16  # of these, how many differ in that row's twin
MAX_ELEMENTS = 20_000_000  # of the gradients that are compared: more would cost memory that training may need
# A model of at most so many weights is tried in fp32 too, which tells a mistake from rounding. It takes four bytes a
# weight more, for a moment.
MAX_FP32_PARAMETERS = 1_000_000_000
# Relative Frobenius distance between two orders of the same sums. In fp32 right tries were within 5e-6 on random models
# whose attention is sharp, and every mistake of tests/unit/engine/test_verify_trie.py is beyond 3e-3. In bf16 right
# tries were within 7e-2 (SmolLM2-135M: 6e-2, where padded rows against rows one by one are 5e-2 apart), and so were
# small mistakes (one label too many, one key of another row): there the bound only tells what is grossly wrong in
# this dtype.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 0.05}
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True, slots=True)
class Verification:
    """How far a trie is from padded rows, computed in ``dtype``: relative distance of the summed loss, and (Frobenius)
    of the gradients put together."""

    loss_distance: float
    gradient_distance: float
    dtype: torch.dtype

    @property
    def bound(self) -> float:
        """The largest distance that is allowed."""
        return BOUNDS.get(self.dtype, BOUNDS[torch.float32])

    @property
    def holds(self) -> bool:
        """Whether both distances are within the bound."""
        return max(self.loss_distance, self.gradient_distance) <= self.bound

    def __str__(self) -> str:
        return (
            f"losses within {self.loss_distance:.1e}, gradients within {self.gradient_distance:.1e} in "
            f"{str(self.dtype).removeprefix('torch.')}; {self.bound:.1e} is allowed"
        )


def choose_packing(model: Any, loss: LabelLoss, config: TrainConfig, data: Data, pad_id: int) -> tuple[Packing, str]:
    """Choose the packing of a run; return it with a sentence for the user that says why.

    Args:
        model: with its trainable parameters, before DeepSpeed; it is verified on the device where it is now.
        loss: of this model.
        config: ``batch.packing`` is followed; ``auto`` falls back to padded, ``trie`` does not.
        data: the first step's rows are what it is verified on.
        pad_id: fills padding.

    Raises:
        ConfigError: ``batch.packing=trie``, and a trie is not possible or not verified.
    """
    limits = Limits(config.batch.micro_size, config.batch.micro_tokens)
    padded, trie = Packing(False, limits, pad_id), Packing(True, limits, pad_id)
    if config.batch.packing == "padded":
        return padded, "packing: padded, as asked"
    reason = trie_obstacle(model)
    if reason is None:
        groups = verification_rows(config, data, smallest_window(model))
        with first_layers(model) as layers:
            found = [one for rows in groups for one in verify_in_each_dtype(model, loss, rows, pad_id)]
        tried = f"{sum(map(len, groups))} rows{layers}"
        worst = max(found, key=lambda v: max(v.loss_distance, v.gradient_distance) / v.bound)
        if worst.holds:
            return trie, f"packing: trie, verified on {tried} against padded ({worst})"
        reason = f"on {tried} it differs from padded ({worst})"
    if config.batch.packing == "trie":
        raise ConfigError(
            "batch.packing", value="trie", reason=f"cannot be used: {reason}", hint="batch.packing=padded"
        )
    return padded, f"packing: padded. A trie cannot be used: {reason}"


def trie_obstacle(model: Any) -> str | None:
    """Return why this model cannot run a trie at all; ``None`` when it can."""
    config = model.config
    if (attention := attention_name(model)) != KERNEL:
        return f"attention is {attention}, which knows padded rows only"
    if is_prompt_learning(model):
        return "virtual tokens stand before every row, and a trie has no place for them"
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return f"{type(base).__name__} takes no position ids"
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {r.get("rope_type") for r in ([rope] if "rope_type" in rope else rope.values()) if isinstance(r, dict)}
    if found := kinds & set(LENGTH_DEPENDENT_ROPE):
        return f"its rotary embedding ({', '.join(sorted(map(str, found)))}) depends on the length of the row"
    layers = set(getattr(config, "layer_types", None) or ())
    if odd := layers - {"full_attention", "sliding_attention"}:
        return f"its layers ({', '.join(sorted(odd))}) are not attention over single tokens"
    return None


def smallest_window(model: Any) -> int | None:
    """Return the tokens of the narrowest sliding window of its layers, if any has one."""
    config = model.config
    windows = [getattr(module, "sliding_window", None) for module in model.modules()]
    kinds = getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    windows.append(getattr(config, "sliding_window", None) if slides else None)
    return min((w for w in windows if isinstance(w, int)), default=None)


def verification_rows(config: TrainConfig, data: Data, window: int | None) -> list[list[Tokens]]:
    """Pick real rows of the first step, in groups that are verified one after the other; short: each takes a second.

    First the two rows that share most, cut around their fork. They come again with every token in the loss, one of them
    cut short: so there are labels at forks, labels that count more than once, and an end inside another row, whatever
    the data holds. Then, if any training row is longer than the sliding window, such a row, and one that leaves it
    shortly before its end.
    """
    chosen = global_batch(config.run.seed, 0, len(data.train), config.batch.global_size)
    rows = data.train.tokens(chosen[:64])
    order, begins = sort_by_tokens([r.ids for r in rows])
    at = int(begins.argmax())
    pair = order[max(0, at - 1) : at + 1].tolist()
    start = max(0, int(begins[at]) - KEPT)
    picked = [Tokens(rows[i].ids[start : start + 2 * KEPT], rows[i].loss_mask[start : start + 2 * KEPT]) for i in pair]
    first, second = picked[0].ids, picked[-1].ids
    groups = [[*picked, _all_in_loss(first), _all_in_loss(second[: len(second) * 2 // 3 + 1])]]
    longer = np.flatnonzero(data.train.lengths > (window or np.inf))
    if window is not None and len(longer):
        ids = data.train.tokens(longer[:1])[0].ids[: window + BEHIND_WINDOW]
        twin = np.concatenate([ids[:-OTHER_TAIL], ids[-OTHER_TAIL:][::-1]])
        groups.append([_all_in_loss(ids), _all_in_loss(twin)])
    return groups


def _all_in_loss(ids: np.ndarray) -> Tokens:
    return Tokens(ids, np.ones(len(ids), dtype=bool))


def verify_in_each_dtype(model: nn.Module, loss: LabelLoss, rows: Sequence[Tokens], pad_id: int) -> list[Verification]:
    """:func:`prove` in fp32 when the model is small enough and not quantised, and in its own 16 bits: there without the
    gradients, which say little more, when fp32 has told them."""
    parameters = list(model.parameters())
    if all(p.dtype == torch.float32 for p in parameters):
        return [verify(model, loss, rows, pad_id)]
    plain = all(p.is_floating_point() and not is_4bit(p) for p in parameters)
    if not plain or sum(p.numel() for p in parameters) > MAX_FP32_PARAMETERS:
        return [verify(model, loss, rows, pad_id)]
    with _in_fp32(model):
        exact = verify(model, loss, rows, pad_id)
    return [exact, verify(model, loss, rows, pad_id, with_gradients=False)]


@contextlib.contextmanager
def _in_fp32(model: nn.Module) -> Iterator[None]:
    """Hold the same values in fp32; the tensors of before are kept and restored."""
    tensors = [*model.parameters(), *model.buffers()]
    held = [(t, t.data) for t in tensors if t.is_floating_point() and t.dtype != torch.float32]
    for tensor, data in held:
        tensor.data = data.float()
    try:
        yield
    finally:
        for tensor, data in held:
            tensor.data = data


def verify(
    model: nn.Module, loss: LabelLoss, rows: Sequence[Tokens], pad_id: int, with_gradients: bool = True
) -> Verification:
    """Compare losses and gradients of some rows in one trie with those of padded rows.

    Args:
        model: in evaluation or training mode; dropout is off while it is verified, and its gradients are left alone.
        loss: of this model.
        rows: with at least one label.
        pad_id: fills padding.
        with_gradients: else their distance is 0.
    """
    unlimited = Limits(len(rows), 0)
    trainable_params = _some([p for p in model.parameters() if p.requires_grad]) if with_gradients else []
    was_training = model.training
    model.eval()
    try:
        which = list(range(len(rows)))
        padded, trie = Packing(False, unlimited, pad_id), Packing(True, unlimited, pad_id)
        expected = _loss_and_gradients(model, loss, [padded.collate(rows, which)], trainable_params)
        found = _loss_and_gradients(model, loss, [trie.collate(rows, which)], trainable_params)
    finally:
        model.train(was_training)
    loss_distance, gradient_distance = _distance(found, expected)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return Verification(loss_distance, gradient_distance, dtype)


def _some(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Pick the first, the last and some between, as many as ``MAX_ELEMENTS`` allow; at least one."""
    step = max(1, sum(p.numel() for p in parameters) // MAX_ELEMENTS)
    return parameters[::step]


def _loss_and_gradients(
    model: nn.Module, loss: LabelLoss, batches: Sequence[MicroBatch], trainable_params: list[nn.Parameter]
) -> tuple[Tensor, list[Tensor]]:
    total, sums = torch.zeros(()), [torch.zeros_like(p, dtype=torch.float32) for p in trainable_params]
    device = next(model.parameters()).device
    for batch in (b.to(device) for b in batches):
        with trie_context(batch.paths), torch.set_grad_enabled(bool(trainable_params)):
            value = loss(model, batch)
            gradients = torch.autograd.grad(value, trainable_params, allow_unused=True) if trainable_params else ()
        total = total + value.detach().cpu()
        for held, gradient in zip(sums, gradients, strict=True):
            if gradient is not None:
                held += gradient
    return total, sums


def _distance(found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> tuple[float, float]:
    """Return the relative distance of the losses, and of the gradients put together."""
    loss = float((found[0] - expected[0]).abs() / expected[0].abs().clamp_min(1e-12))
    apart = sum(float((f - e).square().sum()) for f, e in zip(found[1], expected[1], strict=True))
    whole = sum(float(e.square().sum()) for e in expected[1])
    distance = (apart / max(whole, 1e-30)) ** 0.5
    return (loss, distance) if distance == distance else (float("inf"), float("inf"))
