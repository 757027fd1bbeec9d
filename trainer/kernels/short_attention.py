"""Compute attention of rows with few keys on CPU, forward and backward written out.

There SDPA's backward is slow: forward and backward together take 6 times as long at 46 keys, 3.8 times at 79, 1.3 times
at 256; beyond it the two are near each other (torch 2.13, bf16, 2 cores). Autograd of the same products would keep the
gathered keys and several copies of the scores; here only the probabilities are kept, and keys and values are gathered
again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.compat.torch import softmax_backward
from trainer.kernels.gather import scatter_add_fp32

SHORT_KEYS = 256


def is_short(query: Tensor, keys: int, dropout: float) -> bool:
    """Return whether :class:`ShortAttention` is for these queries and so many keys; dropout is left to SDPA."""
    return query.device.type == "cpu" and keys <= SHORT_KEYS and dropout == 0


class ShortAttention(torch.autograd.Function):
    """Computes softmax attention, grouped-query too: the query heads of one key head make one product."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, keys: Tensor, values: Tensor, gather_index: Tensor, mask: Tensor, scaling: float
    ) -> Tensor:
        """Return the outputs, (rows, heads, queries, width).

        Args:
            query: (rows, heads, queries, width).
            keys, values: (key heads * nodes, width).
            gather_index: which of them stands at each place of (rows, key heads, keys), flattened; int64.
            mask: which keys each query sees, bool, (rows, 1, queries, keys); each query sees one at least.
            scaling: of the scores.
        """
        rows, heads, queries, _ = query.shape
        count = mask.shape[-1]
        q, k, v = _group_by_key_head(query, keys, values, gather_index, count)
        bias = torch.zeros((), dtype=q.dtype).expand(mask.shape).masked_fill(~mask, float("-inf"))
        with torch.autocast("cpu", enabled=False):
            scores = torch.bmm(q * scaling, k.transpose(1, 2))
            scores.view(rows, heads, queries, count).add_(bias)
            probabilities = scores.softmax(-1)
            ctx.save_for_backward(query, keys, values, gather_index, probabilities)
            ctx.scaling = scaling
            return torch.bmm(probabilities, v).view(rows, heads, queries, -1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, keys, values, gather_index, probabilities = ctx.saved_tensors
        q, k, v = _group_by_key_head(query, keys, values, gather_index, probabilities.shape[-1])
        grad_output = grad_outputs[0].reshape(len(q), -1, v.shape[-1])
        grad_v = torch.bmm(probabilities.transpose(1, 2), grad_output)
        grad_scores = softmax_backward(torch.bmm(grad_output, v.transpose(1, 2)), probabilities)
        grad_query = torch.bmm(grad_scores, k).mul_(ctx.scaling).view_as(query)
        grad_k = torch.bmm(grad_scores.transpose(1, 2), q).mul_(ctx.scaling)
        grad_keys = scatter_add_fp32(grad_k, gather_index, len(keys))
        grad_values = scatter_add_fp32(grad_v, gather_index, len(values))
        return grad_query, grad_keys, grad_values, None, None, None


def _group_by_key_head(
    query: Tensor, keys: Tensor, values: Tensor, gather_index: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values as (rows * key heads, …, width): the query heads of a key head one after the
    other, ``count`` keys gathered for them."""
    k, v = (t.index_select(0, gather_index).view(-1, count, t.shape[-1]) for t in (keys, values))
    return query.reshape(len(k), -1, query.shape[-1]), k, v
