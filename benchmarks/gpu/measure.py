"""What the scripts of the campaign share: the device, timing, distances, and the line that a result is printed as."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.engine.kernel_set import limit_sdpa

IS_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if IS_CUDA else "cpu")
# On a CPU only the plumbing is tried: shapes are divided by SCALE, and many CPUs are slow in 16 bits.
DTYPE = torch.bfloat16 if IS_CUDA else torch.float32
SCALE = 1 if IS_CUDA else 16


def emit(stage: str, what: str, **found: Any) -> None:
    """Print a result as the line that ``collect`` looks for; floats with four digits."""
    short = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in found.items()}
    print("RESULT " + json.dumps({"stage": stage, "what": what, **short}), flush=True)


def describe_error(error: Exception) -> str:
    """Return the error's type and message in one short line."""
    return f"{type(error).__name__}: {error}"[:300]


def synchronize() -> None:
    """Wait until the GPU has done what it was asked for; nothing on a CPU."""
    if IS_CUDA:
        torch.cuda.synchronize()


def median_ms(function: Callable[[], Any], times: int = 20, warm_up: int = 3) -> float:
    """Return the median time of a call in ms, by CUDA events; on a CPU one call after one to warm up."""
    for _ in range(warm_up if IS_CUDA else 1):
        function()
    synchronize()
    if not IS_CUDA:
        begin = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - begin)
    found = []
    for _ in range(times):
        begin_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin_event.record()
        function()
        end_event.record()
        end_event.synchronize()
        found.append(begin_event.elapsed_time(end_event))
    return sorted(found)[len(found) // 2]


@contextlib.contextmanager
def cudnn_in_sdpa(allowed: bool) -> Iterator[None]:
    """Let SDPA take cuDNN as torch would, or keep it from it as a run does, inside the ``with`` block."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    if not allowed:
        limit_sdpa(DEVICE)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def output_gradient(output: Tensor) -> Tensor:
    """Return the gradient that every kind is given: random values that bf16 holds, alike for one shape."""
    random = torch.Generator("cpu").manual_seed(1)
    return torch.randn(output.shape, generator=random).bfloat16().to(output.device, output.dtype)


def forward_backward(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """Return a call that runs forward and backward and returns the gradients of ``inputs``."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    with torch.no_grad():
        gradient = output_gradient(function(*leaves))

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*leaves), leaves, gradient)

    return call


def relative_distance(found: Tensor, expected: Tensor) -> float:
    """Return the Frobenius norm of the difference over that of ``expected``, in fp64."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300))


class PeakMemory:
    """Measures the device memory allocated beyond what was held at the beginning, in GiB; 0 on a CPU."""

    def __init__(self) -> None:
        self._held = 0
        if IS_CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._held = torch.cuda.memory_allocated()

    def gib(self) -> float:
        """Return the peak since the beginning."""
        return (torch.cuda.max_memory_allocated() - self._held) / 2**30 if IS_CUDA else 0.0
