"""Read and write moments in 8 bits as bitsandbytes holds them: codes, and a scale a block (Dettmers et al., 2022).

A value is ``levels[code] * scale``. :func:`quantise` gives back the very codes and scales of values that
:func:`dequantise` gave, where they lie in the same blocks; elsewhere the nearest levels.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256
"""Values that share a scale."""
_CHUNK = BLOCK * 2**14
"""Values that are worked on at once: what is held beside them stays small."""


def dequantise(codes: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    """Return the values, fp32 on the CPU, in the shape of ``codes``.

    Args:
        codes: uint8, of any shape.
        scales: fp32, one for each ``BLOCK`` codes in their flat order.
        levels: fp32, (256,), rising.
    """
    flat, scales, levels = codes.flatten(), scales.cpu(), levels.cpu()
    out = torch.empty(flat.numel(), dtype=torch.float32)
    for begin in range(0, flat.numel(), _CHUNK):
        part = levels[flat[begin : begin + _CHUNK].cpu().int()]
        each = scales[begin // BLOCK : begin // BLOCK + _CHUNK // BLOCK].repeat_interleave(BLOCK)
        out[begin : begin + _CHUNK] = part * each[: part.numel()]
    return out.view(codes.shape)


def quantise(values: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes in the shape of ``values``, and a scale a block, on the CPU.

    Args:
        values: fp32, of any shape.
        levels: fp32, (256,), rising, the last one 1.
    """
    flat, levels = values.detach().flatten().cpu(), levels.cpu()
    parts = [_quantise(flat[begin : begin + _CHUNK], levels) for begin in range(0, flat.numel(), _CHUNK)]
    codes, scales = (torch.cat(each) for each in zip(*parts, strict=True))
    return codes[: flat.numel()].view(values.shape), scales


def _quantise(flat: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise whole blocks, the last one filled up with zeros.

    The largest value of a block was quantised to the highest level, which is 1, or to the lowest one, which is a little
    above -1: the scale that gives back all of its values is the largest one, or that over the lowest level, but for the
    rounding of the quotient.
    """
    rows = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    largest = rows.abs().amax(1)
    codes, scales = _nearest(rows, largest, levels), largest.clone()
    exact = _gives(rows, codes, scales, levels)
    if levels[0] < 0:
        quotient = largest / -levels[0]
        zero, infinite = torch.zeros(()), torch.tensor(torch.inf)
        for scale in (quotient, quotient.nextafter(zero), quotient.nextafter(infinite)):
            other = _nearest(rows, scale, levels)
            better = _gives(rows, other, scale, levels) & ~exact
            codes[better], scales[better] = other[better], scale[better]
            exact |= better
    return codes.flatten(), scales


def _nearest(rows: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    """Return the codes of the nearest levels: uint8 (blocks, BLOCK)."""
    middles = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(rows / scales.unsqueeze(1), middles).to(torch.uint8)


def _gives(rows: Tensor, codes: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    """Return which blocks are given back to the bit: bool (blocks,)."""
    return (levels[codes.int()] * scales.unsqueeze(1) == rows).all(1)
