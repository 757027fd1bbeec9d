"""Measure how far a candidate's loss and gradients are from the reference's, and what is allowed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.data.batching.micro_batch import MicroBatch
from trainer.kernels.label_loss import LabelLoss
from trainer.kernels.trie_attention import trie_context

MAX_ELEMENTS = 20_000_000  # of the gradients that are compared: more would cost memory that training may need
# Relative Frobenius distances to the reference, where it was computed in the same dtype: between two orders of the same
# sums. In fp32 right tries were within 5e-6 on random models whose attention is sharp, and every mistake of
# tests/unit/engine/test_verify_kernels.py is beyond 3e-3. In bf16 right tries were within 7e-2 (SmolLM2-135M: 6e-2,
# where padded rows against rows one by one are 5e-2 apart), and so were small mistakes (one label too many, one key of
# another row): there the bound only tells what is grossly wrong in this dtype.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 0.05}

Result = tuple[Tensor, list[Tensor]]  # the summed loss, and the gradients of what is compared


@dataclass(frozen=True, slots=True)
class Verification:
    """How far a candidate is from the reference: relative distance of the summed loss, and (Frobenius) of the gradients
    put together.

    Attributes:
        loss_distance, gradient_distance: 0 where they were not compared.
        dtype: of the candidate's arithmetic.
        own: where the reference was computed in fp32 as well, how far ``dtype`` alone takes it from that.
        error: of a candidate that raised; the distances mean nothing then.
    """

    loss_distance: float
    gradient_distance: float
    dtype: torch.dtype
    own: tuple[float, float] | None = None
    error: str | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        """The largest distances that are allowed: twice the dtype's own and its resolution, else by ``BOUNDS``."""
        if self.own is None:
            return (BOUNDS.get(self.dtype, BOUNDS[torch.float32]),) * 2
        resolution = torch.finfo(self.dtype).eps
        return 2 * self.own[0] + resolution, 2 * self.own[1] + resolution

    @property
    def excess(self) -> float:
        """The larger of the distances, each over its bound."""
        if self.error is not None:
            return float("inf")
        return max(self.loss_distance / self.bounds[0], self.gradient_distance / self.bounds[1])

    @property
    def holds(self) -> bool:
        """Whether both distances are within their bounds."""
        return self.excess <= 1

    def __str__(self) -> str:
        if self.error is not None:
            return self.error
        allowed = " and ".join(dict.fromkeys(f"{bound:.1e}" for bound in self.bounds))
        return (
            f"losses within {self.loss_distance:.1e}, gradients within {self.gradient_distance:.1e} in "
            f"{str(self.dtype).removeprefix('torch.')}; {allowed} is allowed"
        )


def compared_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Pick trainable parameters: the first, the last and some between, as many as ``MAX_ELEMENTS`` allow; at least one
    of those that there are."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    step = max(1, sum(p.numel() for p in parameters) // MAX_ELEMENTS)
    return parameters[::step]


def loss_and_gradients(
    model: nn.Module,
    loss: LabelLoss,
    batches: Sequence[MicroBatch],
    trainable_params: list[nn.Parameter],
    trials: int | None = None,
    shared: bool = False,
) -> Result:
    """Return the summed loss of micro-batches and its gradients; of ``trials`` in each forward, that of the last.
    ``shared``: as :func:`trie_context` takes it."""
    total, sums = torch.zeros(()), [torch.zeros_like(p, dtype=torch.float32) for p in trainable_params]
    device = next(model.parameters()).device
    for batch in (b.to(device) for b in batches):
        with trie_context(batch.paths, trials or 1, shared), torch.set_grad_enabled(bool(trainable_params)):
            value = loss(model, batch) if trials is None else loss(model, batch, trials)[-1]
            gradients = torch.autograd.grad(value, trainable_params, allow_unused=True) if trainable_params else ()
        total = total + value.detach().cpu()
        for held, gradient in zip(sums, gradients, strict=True):
            if gradient is not None:
                held += gradient
    return total, sums


def distances(found: Result, expected: Result) -> tuple[float, float]:
    """Return the relative distance of the losses, and of the gradients put together."""
    loss = float((found[0] - expected[0]).abs() / expected[0].abs().clamp_min(1e-12))
    apart = sum(float((f - e).square().sum()) for f, e in zip(found[1], expected[1], strict=True))
    whole = sum(float(e.square().sum()) for e in expected[1])
    distance = (apart / max(whole, 1e-30)) ** 0.5
    return (loss, distance) if distance == distance else (float("inf"), float("inf"))


@contextlib.contextmanager
def in_fp32(model: nn.Module) -> Iterator[None]:
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
