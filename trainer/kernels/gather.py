"""Gather vectors of which some are wanted more than once, with a backward that sums their gradients in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Above so many copies of a node (a long document under many questions), gathering again costs less than the memory.
MAX_COPIES = 8.0


class Gather(torch.autograd.Function):
    """Gathers vectors, some more than once; their gradients are added up in fp32."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, gather_index: Tensor) -> Tensor:
        """Return ``vectors[gather_index]``: ``vectors`` (count, width), ``gather_index`` int64 (places,)."""
        ctx.save_for_backward(gather_index)
        ctx.count = len(vectors)
        return vectors.index_select(0, gather_index)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gather_index,) = ctx.saved_tensors
        return scatter_add_fp32(grad_outputs[0], gather_index, ctx.count), None


class GatherKeys(torch.autograd.Function):
    """Gathers the keys or values of pieces. Most nodes are a key once: only the gradients of the others are added up,
    in fp32."""

    @staticmethod
    def forward(
        ctx: Any, vectors: Tensor, nodes: Tensor, own: Tensor, prefixes: Tensor, shared: Tensor, prefix_nodes: Tensor
    ) -> Tensor:
        """Return (keys, width): ``vectors`` (nodes, width), and the tensors of ``GatheredKeys``."""
        ctx.save_for_backward(own, prefixes, shared, prefix_nodes)
        return vectors.index_select(0, nodes)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        own, prefixes, shared, prefix_nodes = ctx.saved_tensors
        gradient = grad_outputs[0]
        total = gradient.index_select(0, own)
        sum_dtype = torch.promote_types(total.dtype, torch.float32)
        sums = total.index_select(0, shared).to(sum_dtype)
        sums.index_add_(0, prefix_nodes, gradient.index_select(0, prefixes).to(sum_dtype))
        return total.index_copy_(0, shared, sums.to(total.dtype)), None, None, None, None, None


def scatter_add_fp32(gradients: Tensor, gather_index: Tensor, count: int) -> Tensor:
    """Sum the gradients of gathered vectors, (…, width), onto the ``count`` vectors that ``gather_index`` took them
    from: in fp32 at least, because in bf16 a sum of many would lose the last."""
    flat = gradients.reshape(len(gather_index), gradients.shape[-1])
    sum_dtype = torch.promote_types(flat.dtype, torch.float32)
    total = torch.zeros(count, flat.shape[-1], dtype=sum_dtype, device=flat.device)
    return total.index_add_(0, gather_index, flat.to(sum_dtype)).to(flat.dtype)
