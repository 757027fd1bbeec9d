"""Look up or measure how many floating-point operations a second a device can do: what utilization is measured by."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from trainer.engine.device import device_name

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Dense peaks in TFLOP/s, by words of the card's name, the narrower entry first. From NVIDIA's data sheets (half of the
# figures "with sparsity") and, for the RTX cards, the appendices of the architectures' white papers: tensor cores with
# accumulation in fp32. fp32 is without tensor cores, since torch uses none for it unless TF32 is switched on.
DATA_SHEETS: tuple[tuple[str, dict[torch.dtype, float]], ...] = (
    ("b200", {BF16: 2250, FP16: 2250}),
    ("h200 nvl", {BF16: 835.5, FP16: 835.5, FP32: 60}),
    ("h200", {BF16: 989.4, FP16: 989.4, FP32: 67}),
    ("gh200", {BF16: 989.4, FP16: 989.4, FP32: 67}),
    ("h100 nvl", {BF16: 835.5, FP16: 835.5, FP32: 60}),
    ("h100 pcie", {BF16: 756, FP16: 756, FP32: 51}),
    ("h100", {BF16: 989.4, FP16: 989.4, FP32: 67}),
    ("a100", {BF16: 312, FP16: 312, FP32: 19.5}),
    ("a40", {BF16: 149.7, FP16: 149.7, FP32: 37.4}),
    ("a30", {BF16: 165, FP16: 165, FP32: 10.3}),
    ("a10", {BF16: 125, FP16: 125, FP32: 31.2}),
    ("a10g", {BF16: 70, FP16: 70}),
    ("l4", {BF16: 121, FP16: 121, FP32: 30.3}),
    ("l40s", {BF16: 362, FP16: 362, FP32: 91.6}),
    ("rtx 6000 ada", {BF16: 364.2, FP16: 364.2, FP32: 91.1}),
    ("rtx a6000", {BF16: 154.8, FP16: 154.8, FP32: 38.7}),
    ("geforce rtx 4090", {BF16: 165.2, FP16: 165.2, FP32: 82.6}),
    ("geforce rtx 3090", {BF16: 71, FP16: 71, FP32: 35.6}),
    ("v100 sxm2", {FP16: 125, FP32: 15.7}),
    ("v100 pcie", {FP16: 112, FP32: 14}),
    ("t4", {FP16: 65, FP32: 8.1}),
)
OTHER_CARDS = {"mig", "laptop", "ti", "d"}  # a part of a card, or a slower or faster one of the same number
# Rows and columns of the products that are measured, ascending: which is the fastest depends on the machine.
GPU_SIZES, CPU_SIZES = (8192,), (512, 1024, 2048)
TRIES = 3
MAX_SECONDS = 0.15  # for each size, about; bf16 is emulated on some CPUs, and takes a hundred times as long


@dataclass(frozen=True, slots=True)
class PeakFlops:
    """The most that a device can do.

    Attributes:
        per_second: floating-point operations a second.
        source: where the number comes from, in words.
        is_measured: here and now, so that other work on the machine may have made it too low.
    """

    per_second: float
    source: str
    is_measured: bool = False


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> PeakFlops:
    """Return the peak of a device in a dtype: published, or measured where the card is not known."""
    name = device_name(device)
    published = published_peak(name, dtype) if device.type == "cuda" else None
    if published is not None:
        return PeakFlops(published, f"the data sheet of {name}")
    sizes = GPU_SIZES if device.type == "cuda" else CPU_SIZES
    return PeakFlops(_measure(sizes, device, dtype), f"measured on {name}", is_measured=True)


def published_peak(name: str, dtype: torch.dtype) -> float | None:
    """Return the published dense peak of a card, operations a second; ``None`` where we know of none.

    Args:
        name: as CUDA says it, such as ``NVIDIA A100-SXM4-80GB``.
        dtype: of the matrix products.
    """
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    if words & OTHER_CARDS:
        return None
    peaks = next((peaks for wanted, peaks in DATA_SHEETS if words.issuperset(wanted.split())), {})
    return peaks[dtype] * 1e12 if dtype in peaks else None


def _measure(sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations a second of a square linear layer, at its best of some sizes and tries."""
    best = 0.0
    for size in sizes:
        operations = 2.0 * size**3
        if best and operations / best > MAX_SECONDS:
            break
        x, weight = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
        seconds: list[float] = []
        # At least two, since kernels are chosen in the first.
        while len(seconds) < 2 or (len(seconds) < TRIES and sum(seconds) < MAX_SECONDS):
            begin = time.perf_counter()
            F.linear(x, weight)[0, 0].item()
            seconds.append(time.perf_counter() - begin)
        best = max(best, operations / min(seconds))
    return best
