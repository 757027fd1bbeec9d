"""Attend piece by piece: in one call of ``torch.nn.attention.varlen`` on CUDA in 16 bits, one by one elsewhere.

The varlen call is FlashAttention over pieces of unlike length (Dao, 2023), with a causal mask that is aligned to each
piece's last key. It has no fp32 and runs on CUDA alone; the formulation in SDPA has the same products and is what the
layout is verified with on other devices and in fp32.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.data.batching.pieces import Pieces
from trainer.kernels.gather import MAX_COPIES, GatherKeys

HALF = (torch.bfloat16, torch.float16)


def attend_pieces(
    pieces: Pieces, query: Tensor, key: Tensor, value: Tensor, window: int | None, scaling: float
) -> Tensor:
    """Return the outputs of all tokens, (rows, tokens, heads, width).

    Args:
        pieces: of this forward.
        query: (rows, heads, tokens, width).
        key, value: (rows, key heads, tokens, width).
        window: of a layer with sliding-window attention, in tokens; ``None`` sees the whole path.
        scaling: of the scores.
    """
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (t.to(torch.get_autocast_dtype(query.device.type)) for t in (query, key, value))
    rows, heads, tokens, _ = query.shape
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    attend = partial(_attend, pieces, window, scaling)
    # The gathered keys and values are kept for the backward; where they are many, they are gathered again.
    if torch.is_grad_enabled() and pieces.copies > MAX_COPIES:
        attend = partial(checkpoint, attend, use_reentrant=False)
    attended: Tensor = attend(q, k, v)
    return attended.view(rows, tokens, heads, -1)


def _attend(pieces: Pieces, window: int | None, scaling: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return (tokens, heads, width). ``q``: (tokens, heads, width); ``k``, ``v``: (tokens, key heads, width)."""
    if pieces.gathered is not None:
        k, v = (GatherKeys.apply(t.flatten(1), *pieces.gathered.tensors()).view(-1, *t.shape[1:]) for t in (k, v))
    if q.is_cuda and q.dtype in HALF:
        return _attend_varlen(pieces, window, scaling, q.contiguous(), k.contiguous(), v.contiguous())
    return attend_one_by_one(pieces, window, scaling, q, k, v)


def _attend_varlen(pieces: Pieces, window: int | None, scaling: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    sizes = pieces.query_ends, pieces.key_ends, pieces.max_queries, pieces.max_keys
    left = -1 if window is None else window - 1
    grouped = {"enable_gqa": q.shape[1] != k.shape[1]} if _must_ask_for_grouped_heads() else {}
    attended: Tensor = varlen_attn(q, k, v, *sizes, scale=scaling, window_size=(left, 0), **grouped)
    return attended


@functools.cache
def _must_ask_for_grouped_heads() -> bool:
    """Return whether varlen attention shares key heads only when asked to: older versions of torch always do."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def attend_one_by_one(pieces: Pieces, window: int | None, scaling: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return (tokens, heads, width) by SDPA, a call a piece.

    Args:
        pieces: whose keys ``k`` and ``v`` are gathered already.
        window: as in :func:`attend_pieces`.
        scaling: of the scores.
        q: (tokens, heads, width).
        k, v: (keys, key heads, width).
    """
    return torch.cat(list(_attend_each(pieces, window, scaling, q, k, v)))


def _attend_each(
    pieces: Pieces, window: int | None, scaling: float, q: Tensor, k: Tensor, v: Tensor
) -> Iterator[Tensor]:
    ends = zip(pairwise(pieces.query_ends.tolist()), pairwise(pieces.key_ends.tolist()), strict=True)
    for (begin, end), (first, last) in ends:
        column = torch.arange(last - first, device=q.device)
        own = column[last - first - (end - begin) :, None]
        seen = column <= own
        if window is not None:
            seen &= own - column < window
        piece = (t.transpose(0, 1)[None] for t in (q[begin:end], k[first:last], v[first:last]))
        grouped = q.shape[1] != k.shape[1]
        one = nn.functional.scaled_dot_product_attention(*piece, attn_mask=seen, scale=scaling, enable_gqa=grouped)
        yield one[0].transpose(0, 1)
