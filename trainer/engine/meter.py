"""Measure what a step costs: time, tokens, memory, and the share of the device's arithmetic that it used."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import resource
import time

import torch
from torch import nn

from trainer.distributed.process_group import World


class Meter:
    """Turn a step's raw numbers into the keys of metrics.jsonl.

    Args:
        world: this process.
        model: with its trainable parameters; counted here, before ZeRO partitions it.
        dtype: of its arithmetic.
    """

    def __init__(self, world: World, model: nn.Module, dtype: torch.dtype) -> None:
        from trainer.methods import count_parameters

        self.world = world
        trainable, total = count_parameters(model)
        # A forward is 2 operations a weight and token, the backward 2 more for the activations, and 2 for the
        # gradient of each trainable weight (Kaplan et al., 2020; attention itself is left out).
        self.operations_a_token = 4 * total + 2 * trainable
        self.peak = _matmul_peak(world.device, dtype) * world.world_size

    def measure(self, seconds: float, data_seconds: float, useful: int, computed: int) -> dict[str, float | int]:
        """Return the cost of one step over all ranks.

        Args:
            seconds: wall time of the step.
            data_seconds: of which for making batches.
            useful: the examples' own tokens.
            computed: tokens that the devices ran, padding included.
        """
        return {
            "useful_tokens": useful,
            "computed_tokens": computed,
            "useful_tokens_per_second": useful / seconds,
            "step_seconds": seconds,
            "data_seconds": data_seconds,
            "peak_memory_bytes": peak_memory_bytes(self.world.device),
            "model_flops_utilization": self.operations_a_token * useful / seconds / self.peak,
        }


def give_back_memory(device: torch.device) -> None:
    """Return what is free, but still held by the allocators, to the system: after a phase with tensors unlike those to
    come. On CPU glibc keeps it else, in pieces that no larger tensor fits into."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # another C library, or none that is found so
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that this process has held: on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_name(device: torch.device) -> str:
    """Return the device as people call it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def _matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the operations a second of a plain square matrix product: what utilization is measured against."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):  # the first is slower: kernels are chosen in it
        begin = time.perf_counter()
        (a @ a).flatten()[0].item()
        best = min(best, time.perf_counter() - begin)
    return 2.0 * size**3 / best
