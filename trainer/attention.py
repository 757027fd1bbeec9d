"""Attention over a token trie, as an attention kernel of transformers.

The linear layers see the trie's nodes once. For attention, each stretch of new nodes becomes a row of queries again,
and its keys are gathered along its example's path from the root: a plain causal attention whose queries begin at some
depth. So no node attends to another example, and each query has no more keys than in padded rows. Depth takes the place
of position, also in the sliding window. Outside a trie the kernel is transformers' own SDPA.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from trainer.data.micro import Paths

KERNEL = "afina_trie"
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
    out = []
    for bucket in paths.buckets:
        rows, queries = bucket.queries.shape
        q = nodes.index_select(0, bucket.queries.flatten()).unflatten(0, (rows, queries)).transpose(1, 2)
        k, v = (
            t.index_select(0, bucket.keys.flatten()).unflatten(0, tuple(bucket.keys.shape)).transpose(1, 2)
            for t in (keys, values)
        )
        attended = nn.functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=bucket.mask(sliding_window),
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=k.shape[1] != q.shape[1],
        )
        out.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(out).index_select(0, paths.place).unsqueeze(0), None
