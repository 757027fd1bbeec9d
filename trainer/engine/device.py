"""Name the device, and measure and give back the memory that this process holds of it."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import resource

import torch


def device_name(device: torch.device) -> str:
    """Return the device as people call it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def give_back_memory(device: torch.device) -> None:
    """Return what is free, but still held by the allocators, to the system: after a phase with tensors unlike those to
    come. On CPU glibc keeps it else, in pieces that no larger tensor fits into."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # another C library, or none that is found so
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak_memory(device: torch.device) -> None:
    """Count the peak from now on, on a GPU; on CPU the system counts from the start of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return the most memory that this process has held, by its keys in metrics.jsonl, in bytes.

    ``peak_memory_bytes`` is what tensors took on the GPU, or what was resident on CPU; ``reserved_memory_bytes``, on a
    GPU only, what the allocator held for them: what the card must have.
    """
    if device.type == "cuda":
        return {
            "peak_memory_bytes": int(torch.cuda.max_memory_allocated(device)),
            "reserved_memory_bytes": int(torch.cuda.max_memory_reserved(device)),
        }
    return {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
