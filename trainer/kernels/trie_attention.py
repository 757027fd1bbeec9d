"""Attention over a token trie, as an attention kernel of transformers.

The linear layers see the trie's nodes once. For attention, each stretch of new nodes becomes a row of queries again,
and its keys are gathered along its example's path from the root: a plain causal attention whose queries begin at some
depth. So no node attends to another example, and each query has no more keys than in padded rows. Depth takes the place
of position, also in the sliding window. Outside a trie the kernel is transformers' own SDPA.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from trainer.data.batching.trie_paths import TriePaths
from trainer.kernels.short_attention import ShortAttention, is_short, summed_back

KERNEL = "afina_trie"
# Beyond so many copies a node (a long document under many questions), gathering again costs less than the memory.
MAX_COPIES = 8.0
_paths: list[TriePaths] = []  # of the micro-batch in its forward or backward; recomputation there needs it too


@contextlib.contextmanager
def trie_context(paths: TriePaths | None) -> Iterator[None]:
    """Attend along these paths in the forwards and backwards inside; ``None`` changes nothing."""
    if paths is None:
        yield
        return
    _paths.append(paths)
    try:
        yield
    finally:
        _paths.pop()


def register() -> None:
    """Make the kernel known to transformers under its name."""
    AttentionInterface.register(KERNEL, trie_attention)
    AttentionMaskInterface.register(KERNEL, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def trie_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface.

    Args:
        module: the attention layer.
        query: (1, heads, nodes, width) in a trie.
        key, value: (1, key heads, nodes, width).
        attention_mask: not used in a trie.
        dropout: of attention probabilities.
        scaling: of the scores; null: one over the root of the width.
        sliding_window: of this layer, in tokens.
        **others: what some models add; ``softcap`` and attention sinks are not for this kernel.

    Returns:
        (1, nodes, heads, width) and no weights.
    """
    if not _paths:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    if others.get("softcap") is not None or others.get("s_aux") is not None:
        raise ValueError("attention with soft-capping or sinks has no trie kernel")
    paths = _paths[-1]
    _, heads, nodes, width = query.shape
    scaling = width**-0.5 if scaling is None else scaling
    order = paths.query_order(heads)
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (t.to(torch.get_autocast_dtype(query.device.type)) for t in (query, key, value))
    queries = _Reorder.apply(query.reshape(-1, width), order.gather, order.inverse, None)
    flat = key.reshape(-1, width), value.reshape(-1, value.shape[-1])
    sizes = [b.queries.numel() * heads for b in paths.buckets]
    out = []
    for bucket, at, q in zip(paths.buckets, paths.key_indices(key.shape[1]), queries.split(sizes), strict=True):
        q = q.view(len(bucket.queries), heads, -1, width)
        mask = bucket.mask(sliding_window)
        if is_short(q, bucket.keys.shape[1], dropout):
            attended = ShortAttention.apply(q, *flat, at, mask, scaling)
        else:
            attend = partial(_attend, at, mask, scaling, dropout)
            # The gathered keys and values are kept for the backward; where they are many, they are gathered anew.
            gather_again = torch.is_grad_enabled() and paths.copies > MAX_COPIES
            attended = checkpoint(attend, q, *flat, use_reentrant=False) if gather_again else attend(q, *flat)
        out.append(attended.reshape(-1, attended.shape[-1]))
    # The layers that follow want the heads of a node side by side.
    attended = _Reorder.apply(torch.cat(out), order.node_inverse, order.node_gather, order.padding)
    return attended.view(1, nodes, heads, -1), None


def _attend(
    at: Tensor, mask: Tensor, scaling: float, dropout: float, q: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """The outputs of a bucket's queries: (rows, heads, queries, width), by SDPA.

    Args:
        at: where the keys stand in ``keys`` and ``values``.
        mask: bool, (rows, 1, queries, keys).
        scaling: of the scores.
        dropout: of the probabilities.
        q: (rows, heads, queries, width).
        keys, values: (key heads * nodes, width).
    """
    rows, _, _, count = mask.shape
    k, v = (_Gather.apply(t, at).view(rows, -1, count, t.shape[-1]) for t in (keys, values))
    return nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=k.shape[1] != q.shape[1]
    )


class _Reorder(torch.autograd.Function):
    """Vectors, each at least once, in another order. The gradient of the copies that fill up is zero by construction or
    not wanted, so the backward is a reordering too, and no sum."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, there: Tensor, back: Tensor, fillers: Tensor | None) -> Tensor:
        """``vectors[there]``; ``back`` says where each vector's gradient stands, ``fillers`` which are none."""
        ctx.save_for_backward(back, fillers)
        return vectors.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        back, fillers = ctx.saved_tensors
        gradient = outer[0].index_select(0, back)
        return gradient if fillers is None else gradient.index_fill_(0, fillers, 0), None, None, None


class _Gather(torch.autograd.Function):
    """Vectors, some more than once. Their gradients are summed in fp32: in bf16 the sum of many would lose the last."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, at: Tensor) -> Tensor:
        ctx.save_for_backward(at)
        ctx.count = len(vectors)
        return vectors.index_select(0, at)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (at,) = ctx.saved_tensors
        return summed_back(outer[0], at, ctx.count), None
