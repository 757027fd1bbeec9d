"""Lay tensors one behind the other in one buffer, so that they go to the device in one copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes: of each tensor's begin; a multiple of every dtype's size, and what vectorised loads want


def flatten(tensors: Sequence[Tensor], pin_memory: bool = False) -> Tensor:
    """Copy tensors into one new buffer on the host.

    Args:
        tensors: of any dtypes and shapes, on the host.
        pin_memory: in page-locked memory, from which a copy to a GPU does not hold up the host; needs CUDA.

    Returns:
        uint8, shape (bytes,); :func:`unflatten` finds the tensors in it.
    """
    size = max((end for _, end in _extents(tensors)), default=0)
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pin_memory)
    raw = buffer.numpy()
    for tensor, (begin, end) in zip(tensors, _extents(tensors), strict=True):
        if begin < end:
            # by numpy: torch would start a team of threads for a large tensor, and once more for each thread that asks
            raw[begin:end] = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return buffer


def unflatten(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors in a buffer, as views of it.

    Args:
        buffer: by :func:`flatten`, or a copy of it on any device.
        like: the tensors that were flattened: their dtypes and shapes alone are looked at.
    """
    return [
        buffer[begin:end].view(tensor.dtype).view(tensor.shape)
        for tensor, (begin, end) in zip(like, _extents(like), strict=True)
    ]


def _extents(tensors: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    """Yield where each tensor begins and ends, in bytes."""
    begin = 0
    for tensor in tensors:
        end = begin + tensor.numel() * tensor.element_size()
        yield begin, end
        begin = -(-end // ALIGNMENT) * ALIGNMENT
