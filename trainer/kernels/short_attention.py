"""Attention of rows with few keys on CPU, written out forward and backward.

There SDPA's backward is slow: forward and backward together take 6 times as long at 46 keys, 3.8 times at 79, 1.3 times
at 256; beyond it the two are near each other (torch 2.13, bf16, 2 cores). Autograd of the same products would keep the
gathered keys and several copies of the scores; here only the probabilities are kept, and keys and values are gathered
again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SHORT_KEYS = 256


def is_short(query: Tensor, keys: int, dropout: float) -> bool:
    """Whether :class:`ShortAttention` is for these queries and so many keys; dropout is left to SDPA."""
    return query.device.type == "cpu" and keys <= SHORT_KEYS and dropout == 0


class ShortAttention(torch.autograd.Function):
    """Softmax attention; query heads that have one key head make one product."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, keys: Tensor, values: Tensor, at: Tensor, mask: Tensor, scaling: float
    ) -> Tensor:
        """The outputs, (rows, heads, queries, width).

        Args:
            query: (rows, heads, queries, width).
            keys, values: (key heads * nodes, width).
            at: where the keys of (rows, key heads, keys), flattened, stand among them; int64.
            mask: which keys each query sees, bool, (rows, 1, queries, keys); each query sees one at least.
            scaling: of the scores.
        """
        rows, heads, queries, _ = query.shape
        count = mask.shape[-1]
        q, k, v = _side_by_side(query, keys, values, at, count)
        bias = torch.zeros((), dtype=q.dtype).expand(mask.shape).masked_fill(~mask, float("-inf"))
        with torch.autocast("cpu", enabled=False):
            scores = torch.bmm(q * scaling, k.transpose(1, 2))
            scores.view(rows, heads, queries, count).add_(bias)
            probabilities = scores.softmax(-1)
            ctx.save_for_backward(query, keys, values, at, probabilities)
            ctx.scaling = scaling
            return torch.bmm(probabilities, v).view(rows, heads, queries, -1)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        query, keys, values, at, probabilities = ctx.saved_tensors
        q, k, v = _side_by_side(query, keys, values, at, probabilities.shape[-1])
        out = outer[0].reshape(len(q), -1, v.shape[-1])
        of_values = torch.bmm(probabilities.transpose(1, 2), out)
        # The gradient of a softmax; fused, it reads the 16-bit tensors once and reckons in fp32.
        of_scores = torch.ops.aten._softmax_backward_data(
            torch.bmm(out, v.transpose(1, 2)), probabilities, -1, probabilities.dtype
        )
        of_query = torch.bmm(of_scores, k).mul_(ctx.scaling).view_as(query)
        of_keys = torch.bmm(of_scores.transpose(1, 2), q).mul_(ctx.scaling)
        return of_query, summed_back(of_keys, at, len(keys)), summed_back(of_values, at, len(values)), None, None, None


def summed_back(gradients: Tensor, at: Tensor, count: int) -> Tensor:
    """Gradients of gathered vectors, (…, width), summed onto the ``count`` vectors that they were gathered from by
    ``at``: in fp32 at least, because in bf16 a sum of many would lose the last."""
    flat = gradients.reshape(len(at), gradients.shape[-1])
    kept = torch.promote_types(flat.dtype, torch.float32)
    total = torch.zeros(count, flat.shape[-1], dtype=kept, device=flat.device)
    return total.index_add_(0, at, flat.to(kept)).to(flat.dtype)


def _side_by_side(query: Tensor, keys: Tensor, values: Tensor, at: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of (rows * key heads, …, width)."""
    k, v = (t.index_select(0, at).view(-1, count, t.shape[-1]) for t in (keys, values))
    return query.reshape(len(k), -1, query.shape[-1]), k, v
