"""Verify at start-up, on the loaded model and real rows, that packing and kernels give the reference's gradient.

The reference is eager attention over padded rows with no kernel of ours. What differs from it beyond the dtype's own
distance, or raises, is taken out one step at a time, and the log says which and why.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainer.compat.bitsandbytes import is_4bit
from trainer.compat.transformers import attention_name
from trainer.config.schema import TrainConfig
from trainer.data.batching.micro_batch import Tokens
from trainer.data.batching.packing import Packing
from trainer.data.batching.rank_split import Limits
from trainer.data.run_data import Data
from trainer.engine.kernel_set import KernelSet
from trainer.engine.trie_obstacle import trie_obstacle
from trainer.engine.verification import (
    Result,
    Verification,
    compared_parameters,
    distances,
    in_fp32,
    loss_and_gradients,
)
from trainer.engine.verification_rows import smallest_window, verification_rows
from trainer.engine.verify_varlen import verify_varlen
from trainer.errors import ConfigError
from trainer.kernels.label_loss import LabelLoss
from trainer.kernels.trie_attention import KERNEL
from trainer.kernels.varlen_attention import HALF
from trainer.models.first_layers import first_layers
from trainer.tracking.counter import ProgressCounter

# A model of at most so many weights is tried in fp32 too, which tells a mistake from rounding. It takes four bytes a
# weight more, for a moment.
MAX_FP32_PARAMETERS = 1_000_000_000
FP32_SHARE_OF_FREE_MEMORY = 0.5  # of a GPU, where it is more than that


@dataclass(frozen=True, slots=True)
class Choice:
    """What a run computes with.

    Attributes:
        packing: of its examples into forwards.
        kernels: names of those in use.
        lines: for the log, each with its reason.
    """

    packing: Packing
    kernels: tuple[str, ...]
    lines: tuple[str, ...]


def choose_packing_and_kernels(
    model: Any,
    loss: LabelLoss,
    config: TrainConfig,
    data: Data,
    pad_id: int,
    kernels: KernelSet | None = None,
    device: torch.device | None = None,
) -> Choice:
    """Choose the packing and the kernels of a run, and take those that do not hold out of the model.

    Args:
        model: with its trainable parameters, before DeepSpeed.
        loss: of this model.
        config: ``batch.packing`` is followed; ``auto`` falls back to padded, ``trie`` does not.
        data: the first step's rows are what it is verified on.
        pad_id: fills padding.
        kernels: installed on the model; ``None``: none are.
        device: where it will run, and is verified if what is tried fits there; ``None``: where it is now.

    Raises:
        ConfigError: ``batch.packing=trie``, and a trie is not possible or not verified.
    """
    kernels = kernels or KernelSet(model)
    groups = verification_rows(config, data, smallest_window(model))
    with first_layers(model) as layers, _moved(model, device):
        verifier = Verifier(model, loss, groups, pad_id, kernels, f"{sum(map(len, groups))} rows{layers}")
        is_asked = config.batch.packing != "padded" or kernels.names
        counter = ProgressCounter(f"verifying packing and kernels on {verifier.tried}")
        with counter if is_asked else contextlib.nullcontext():
            uses_trie, why = _choose_packing(verifier, config.batch.packing)
            if not uses_trie and kernels.names:
                verifier.settle(uses_trie=False)
    limits = Limits(config.batch.micro_size, config.batch.micro_tokens)
    noise = config.model.neftune_alpha is not None
    packing = Packing(uses_trie, limits, pad_id, in_pieces="varlen" in kernels.names, with_noise=noise)
    return Choice(packing, kernels.names, (why, *verifier.notes, _describe(kernels, verifier.worst)))


@contextlib.contextmanager
def _moved(model: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Hold the model on the device for a while, where it takes less than a third of what is free there: under ZeRO-3
    it waits on the CPU, and its kernels are the GPU's."""
    before = next(model.parameters()).device
    if device is None or device.type != "cuda" or before.type == "cuda":
        yield
        return
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if size * 3 > torch.cuda.mem_get_info(device)[0]:
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(before)


def _choose_packing(verifier: Verifier, asked: str) -> tuple[bool, str]:
    """Return whether tries are used, and a sentence for the user that says why."""
    if asked == "padded":
        return False, "packing: padded, as asked"
    reason = trie_obstacle(verifier.model)
    if reason is None:
        worst = verifier.settle(uses_trie=True)
        if worst.holds:
            return True, f"packing: trie, verified on {verifier.tried} against padded ({worst})"
        what = "it raised" if worst.error is not None else "it differs from padded"
        reason = f"on {verifier.tried} {what} ({worst})"
    if asked == "trie":
        raise ConfigError(
            "batch.packing", value="trie", reason=f"cannot be used: {reason}", hint="batch.packing=padded"
        )
    return False, f"packing: padded. A trie cannot be used: {reason}"


def _describe(kernels: KernelSet, worst: Verification | None) -> str:
    if not kernels.names:
        return "kernels: none but PyTorch's own"
    return f"kernels: {', '.join(kernels.names)}, verified against eager attention without them ({worst})"


class Verifier:
    """Try candidates on some rows, and take out the kernels that do not hold.

    Args:
        model: cut to what is tried.
        loss: of this model.
        groups: of rows, each tried by itself.
        pad_id: fills padding.
        kernels: on the model.
        tried: the rows and layers in words.

    Attributes:
        worst: of the last candidate that was settled on.
        notes: which kernels were taken out, and why.
    """

    def __init__(
        self, model: Any, loss: LabelLoss, groups: list[list[Tokens]], pad_id: int, kernels: KernelSet, tried: str
    ) -> None:
        self.model, self.loss, self.groups, self.pad_id, self.kernels = model, loss, groups, pad_id, kernels
        self.tried = tried
        self.worst: Verification | None = None
        self.notes: list[str] = []

    def settle(self, uses_trie: bool) -> Verification:
        """Try the kernels together, then without each of them, then without any; keep the first set that holds.

        Returns:
            of that set; where none holds, of the first one, and all kernels are still in use.
        """
        self.worst = first = self.attempt(uses_trie)
        if first.holds:
            return first
        names = self.kernels.names
        for left_out in [*((name,) for name in names), *([names] if len(names) > 1 else [])]:
            with self.kernels.without(*left_out):
                found = self.attempt(uses_trie)
            if found.holds:
                self.kernels.remove(*left_out)
                self.notes.append(f"kernels: {', '.join(left_out)} left out on {self.tried}: {first}")
                self.worst = found
                return found
        return first

    def attempt(self, uses_trie: bool) -> Verification:
        """Return the worst verification of the kernels as they are, over all groups of rows and dtypes."""
        found = [one for rows in self.groups for one in verify_in_each_dtype(self, rows, uses_trie)]
        parameter = next(p for p in self.model.parameters() if p.is_floating_point() and not is_4bit(p))
        if "varlen" in self.kernels.names and parameter.dtype in HALF:
            window = smallest_window(self.model)
            found.append(verify_varlen(self.model, parameter.dtype, parameter.device, window))
        return max(found, key=lambda v: v.excess)

    def reference(self, rows: Sequence[Tokens], with_gradients: bool = True) -> Result:
        """Return the loss and gradients of padded rows under eager attention, without any kernel of ours."""
        packing = Packing(False, Limits(len(rows), 0), self.pad_id)
        with self.kernels.without(*self.kernels.names), _eager_attention(self.model):
            return self._run(packing, rows, with_gradients)

    def candidate(self, rows: Sequence[Tokens], uses_trie: bool, with_gradients: bool = True) -> Result:
        """Return the loss and gradients with the kernels as they are."""
        packing = Packing(uses_trie, Limits(len(rows), 0), self.pad_id, in_pieces="varlen" in self.kernels.names)
        return self._run(packing, rows, with_gradients)

    def _run(self, packing: Packing, rows: Sequence[Tokens], with_gradients: bool) -> Result:
        model = self.model
        compared = compared_parameters(model) if with_gradients else []
        was_training = model.training
        model.eval()
        try:
            return loss_and_gradients(model, self.loss, [packing.collate(rows, range(len(rows)))], compared)
        finally:
            model.train(was_training)


@contextlib.contextmanager
def _eager_attention(model: Any) -> Iterator[None]:
    """Let a model with the trie kernel attend as its authors wrote it."""
    if attention_name(model) != KERNEL:
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(KERNEL)


def verify_in_each_dtype(verifier: Verifier, rows: Sequence[Tokens], uses_trie: bool) -> list[Verification]:
    """:func:`verify` in fp32 where there is memory for it and nothing is quantised, and in the model's own 16 bits.

    On CPU the latter leaves out the gradients, which say little more, when fp32 has told them.
    """
    model = verifier.model
    parameters = list(model.parameters())
    if all(p.dtype == torch.float32 for p in parameters) or not fits_in_fp32(model):
        return [verify(verifier, rows, uses_trie)]
    with in_fp32(model):
        exact = verify(verifier, rows, uses_trie)
        if not exact.holds:
            return [exact]
        if parameters[0].is_cuda:
            reference = verifier.reference(rows)
    if not parameters[0].is_cuda:
        return [exact, verify(verifier, rows, uses_trie, with_gradients=False)]
    return [exact, verify(verifier, rows, uses_trie, exact_reference=reference)]


def fits_in_fp32(model: nn.Module) -> bool:
    """Return whether nothing of a model is quantised, and there is memory for its weights in fp32."""
    parameters = list(model.parameters())
    plain = all(p.is_floating_point() and not is_4bit(p) for p in parameters)
    return plain and sum(p.numel() for p in parameters) <= _max_fp32_parameters(parameters[0].device)


def _max_fp32_parameters(device: torch.device) -> int:
    if device.type != "cuda":
        return MAX_FP32_PARAMETERS
    free, _ = torch.cuda.mem_get_info(device)
    return max(MAX_FP32_PARAMETERS, int(free * FP32_SHARE_OF_FREE_MEMORY) // 4)


def verify(
    verifier: Verifier,
    rows: Sequence[Tokens],
    uses_trie: bool,
    with_gradients: bool = True,
    exact_reference: Result | None = None,
) -> Verification:
    """Compare losses and gradients of some rows, with the kernels and packing to be tried, with the reference's.

    Args:
        verifier: its model may be in evaluation or training mode; dropout is off while it is verified, and its
            gradients are left alone.
        rows: with at least one label.
        uses_trie: of the candidate.
        with_gradients: else their distance is 0.
        exact_reference: of the same rows in fp32, which the candidate is measured by then.
    """
    expected = verifier.reference(rows, with_gradients)
    dtype = next(p.dtype for p in verifier.model.parameters() if p.is_floating_point())
    own = None if exact_reference is None else distances(expected, exact_reference)
    try:
        found = verifier.candidate(rows, uses_trie, with_gradients)
    except Exception as error:  # a kernel's, of whatever kind: it is taken out then, and the run goes on
        message = " ".join(str(error).split())[:200]
        return Verification(0.0, 0.0, dtype, own, f"{type(error).__name__}: {message}")
    return Verification(*distances(found, exact_reference or expected), dtype, own)
