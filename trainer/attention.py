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

from trainer.data.micro import Bucket, Paths

KERNEL = "afina_trie"
# Up to so many keys, SDPA's backward on CPU is slower than the products written out: 8 times at 46 keys, 4 at 79, and
# faster at 512 (torch 2.13, bf16, 2 cores).
SHORT_KEYS = 256
# Beyond so many copies a node (a long document under many questions), gathering again costs less than the memory.
MOST_COPIES = 8.0
_paths: list[Paths] = []  # of the micro-batch in its forward or backward; recomputation in the backward needs it too


@contextlib.contextmanager
def along(paths: Paths | None) -> Iterator[None]:
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
    nodes, keys, values = (t[0].transpose(0, 1) for t in (query, key, value))
    # The gathered keys and values would be kept for the backward: where they are many, they are gathered anew instead.
    gather_again = torch.is_grad_enabled() and paths.copies > MOST_COPIES
    out = []
    for bucket in paths.buckets:
        attend = partial(_attend, bucket, bucket.mask(sliding_window), scaling, dropout)
        if gather_again:
            out.append(checkpoint(attend, nodes, keys, values, use_reentrant=False))
        else:
            out.append(attend(nodes, keys, values))
    return torch.cat(out).index_select(0, paths.place).unsqueeze(0), None


def _attend(
    bucket: Bucket,
    mask: Tensor,
    scaling: float | None,
    dropout: float,
    nodes: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """The outputs of a bucket's queries: (rows * queries, heads, width), from node tensors (nodes, heads, width)."""
    rows, queries = bucket.queries.shape
    q = nodes.index_select(0, bucket.queries.flatten()).unflatten(0, (rows, queries)).transpose(1, 2)
    k, v = (
        t.index_select(0, bucket.keys.flatten()).unflatten(0, tuple(bucket.keys.shape)).transpose(1, 2)
        for t in (keys, values)
    )
    if q.device.type == "cpu" and k.shape[2] <= SHORT_KEYS:
        attended = _attend_short(q, k, v, mask, scaling, dropout)
    else:
        attended = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=k.shape[1] != q.shape[1]
        )
    return attended.transpose(1, 2).flatten(0, 1)


def _attend_short(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float | None, dropout: float) -> Tensor:
    """The same sums as SDPA, written out, softmax in at least fp32; query heads with one key head make one product."""
    rows, heads, queries, width = q.shape
    groups = heads // k.shape[1]
    grouped = q.reshape(rows, k.shape[1], groups * queries, width)
    scores = (grouped @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32))
    scores = scores * (width**-0.5 if scaling is None else scaling)
    scores = scores.unflatten(2, (groups, queries)).masked_fill(~mask[:, :, None], float("-inf"))
    shares = nn.functional.dropout(scores.softmax(-1).to(v.dtype), dropout).flatten(2, 3)
    return (shares @ v).reshape(rows, heads, queries, width)
