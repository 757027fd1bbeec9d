"""Compute attention over a token trie, as an attention kernel of transformers.

The linear layers see the trie's nodes once. For attention, each stretch of new nodes becomes a row of queries again,
and its keys are gathered along its example's path from the root: a plain causal attention whose queries begin at some
depth. So no node attends to another example, and each query has no more keys than in padded rows. Depth takes the place
of position, also in the sliding window. Outside a trie the kernel is transformers' own SDPA.

That is how rows of queries attend where there is no better kernel: on CPU, and in SDPA on CUDA. Where the layout of the
micro-batch is in pieces (:class:`Pieces`), padded rows too, ``varlen_attention`` takes it.

A forward of a trie is marked by its mask (:func:`trie_mask`), and its paths come from :func:`trie_context`: the one
without the other raises, since either would silently attend to the wrong tokens.
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

from trainer.compat.transformers import sdpa
from trainer.data.batching.pieces import Pieces
from trainer.data.batching.trie_paths import TriePaths
from trainer.kernels.gather import MAX_COPIES, Gather
from trainer.kernels.short_attention import ShortAttention, is_short
from trainer.kernels.varlen_attention import attend_pieces

KERNEL = "afina_trie"
SDPA, SDPA_MASK = sdpa()
# Of the micro-batch in its forward or backward, since recomputation there needs it too: by the rows of a layer, which
# has those of all trials, or of one where they are all the same.
_paths: list[dict[int, TriePaths | Pieces]] = []


@contextlib.contextmanager
def trie_context(paths: TriePaths | Pieces | None, trials: int = 1, shared: bool = False) -> Iterator[None]:
    """Attend along these paths in the forwards and backwards inside.

    Args:
        paths: of one micro-batch; ``None`` changes nothing.
        trials: how many times the micro-batch stands in the batch of the forward.
        shared: layers may have it once, for all trials.
    """
    if paths is None:
        yield
        return
    rows = 1 if isinstance(paths, TriePaths) else paths.rows
    of_all = paths if isinstance(paths, TriePaths) or trials == 1 else paths.repeated(trials)
    _paths.append({trials * rows: of_all, **({rows: paths} if shared else {})})
    try:
        yield
    finally:
        _paths.pop()


def trie_mask(device: torch.device) -> Tensor:
    """Return the attention mask that marks a forward as a trie's: bool, shape (1, 1, 1, 1).

    transformers hands on a mask of four dimensions as it is, and makes none of its own, which a trie would not look at.
    """
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def _check_context(query: Tensor, attention_mask: Tensor | None) -> None:
    """Raise a :class:`RuntimeError` unless a marked forward has its own context and any other has none.

    By shapes alone, so that no device is waited for. The mask of a row of one token looks like a trie's: of one node,
    which attends to itself alone in either way.
    """
    rows, _, tokens, _ = query.shape
    is_marked = attention_mask is not None and attention_mask.numel() == 1
    if not _paths:
        if is_marked and tokens > 1:
            raise RuntimeError("a trie's forward (or its recomputation in the backward) is outside of its trie_context")
    elif not is_marked:
        raise RuntimeError("a forward of padded rows is inside a trie_context, which is for a trie's alone")
    elif rows not in (by_rows := _paths[-1]) or by_rows[rows].shape[1] != tokens:
        whole = max(by_rows)
        wanted = f"{whole} × {by_rows[whole].shape[1]}"
        raise RuntimeError(f"a forward of {rows} × {tokens} tokens is inside the trie_context of {wanted}")


def register() -> None:
    """Register the kernel with transformers under its name."""
    AttentionInterface.register(KERNEL, trie_attention)
    AttentionMaskInterface.register(KERNEL, SDPA_MASK)


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
    """Attend by transformers' attention interface: along the paths of a trie inside its context, else by SDPA.

    Args:
        module: the attention layer.
        query: (trials, heads, nodes, width) in a trie.
        key, value: (trials, key heads, nodes, width).
        attention_mask: :func:`trie_mask` in a trie; else for SDPA.
        dropout: of attention probabilities.
        scaling: of the scores; null: one over the root of the width.
        sliding_window: of this layer, in tokens.
        **others: what some models add; ``softcap`` and attention sinks are not for this kernel.

    Returns:
        (trials, nodes, heads, width) and no weights.

    Raises:
        RuntimeError: a trie outside of its :func:`trie_context`, or anything else inside one.
        ValueError: a trie, and an argument that has no trie kernel.
    """
    _check_context(query, attention_mask)
    if not _paths:
        return SDPA(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others)
    if others.get("softcap") is not None or others.get("s_aux") is not None:
        raise ValueError("attention with soft-capping or sinks has no trie kernel")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    paths = _paths[-1][len(query)]
    if isinstance(paths, TriePaths):
        return _attend_trie(paths, query, key, value, sliding_window, scaling, dropout), None
    if dropout:
        raise ValueError("varlen attention has no dropout of its probabilities")
    return attend_pieces(paths, query, key, value, sliding_window, scaling), None


def _attend_trie(
    paths: TriePaths, query: Tensor, key: Tensor, value: Tensor, window: int | None, scaling: float, dropout: float
) -> Tensor:
    """Return the outputs of a trie's nodes, (trials, nodes, heads, width), bucket by bucket of its paths.

    The trials share the paths: their heads stand one after another, as those of one trial.
    """
    trials, own_heads, nodes, width = query.shape
    heads = trials * own_heads
    order = paths.query_order(heads, trials)
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (t.to(torch.get_autocast_dtype(query.device.type)) for t in (query, key, value))
    queries = _Reorder.apply(query.reshape(-1, width), order.gather, order.inverse, None)
    keys_and_values = key.reshape(-1, width), value.reshape(-1, value.shape[-1])
    query_rows = queries.split([b.queries.numel() * heads for b in paths.buckets])
    key_indices = paths.key_indices(trials * key.shape[1])
    out = []
    for bucket, gather_index, q in zip(paths.buckets, key_indices, query_rows, strict=True):
        q = q.view(len(bucket.queries), heads, -1, width)
        mask = bucket.mask(window)
        if is_short(q, bucket.keys.shape[1], dropout):
            attended = ShortAttention.apply(q, *keys_and_values, gather_index, mask, scaling)
        else:
            attend = partial(_attend_bucket, gather_index, mask, scaling, dropout)
            # The gathered keys and values are kept for the backward; where they are many, they are gathered again.
            if torch.is_grad_enabled() and paths.copies > MAX_COPIES:
                attend = partial(checkpoint, attend, use_reentrant=False)
            attended = attend(q, *keys_and_values)
        out.append(attended.reshape(-1, attended.shape[-1]))
    # The layers that follow want the heads of a node side by side.
    attended = _Reorder.apply(torch.cat(out), order.node_inverse, order.node_gather, order.padding)
    return attended.view(trials, nodes, own_heads, -1)


def _attend_bucket(
    gather_index: Tensor, mask: Tensor, scaling: float, dropout: float, q: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Return the outputs of a bucket's queries, (rows, heads, queries, width), by SDPA.

    Args:
        gather_index: which of ``keys`` and ``values`` stands at each place of (rows, key heads, keys), flattened.
        mask: bool, (rows, 1, queries, keys).
        scaling: of the scores.
        dropout: of the probabilities.
        q: (rows, heads, queries, width).
        keys, values: (key heads * nodes, width).
    """
    rows, _, _, count = mask.shape
    k, v = (Gather.apply(t, gather_index).view(rows, -1, count, t.shape[-1]) for t in (keys, values))
    if packs_query_heads(q):
        groups = q.shape[1] // k.shape[1]
        packed = q.reshape(rows, k.shape[1], -1, q.shape[-1])
        wide = mask.repeat(1, 1, groups, 1)
        out = nn.functional.scaled_dot_product_attention(packed, k, v, attn_mask=wide, dropout_p=dropout, scale=scaling)
        return out.reshape(rows, q.shape[1], -1, v.shape[-1])
    return nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=k.shape[1] != q.shape[1]
    )


def packs_query_heads(query: Tensor) -> bool:
    """Return whether the query heads of one key head are laid side by side as queries: on CUDA, where SDPA with both a
    mask and ``enable_gqa`` is the math kernel, with its scores in fp32 memory."""
    return query.is_cuda


class _Reorder(torch.autograd.Function):
    """Reorders vectors, each taken at least once. The gradient of the copies that fill up is zero by construction or
    not wanted, so the backward is a reordering too, and no sum."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, index: Tensor, inverse: Tensor, padding: Tensor | None) -> Tensor:
        """``vectors[index]``; ``inverse`` says where each vector's gradient stands, ``padding`` which are none."""
        ctx.save_for_backward(inverse, padding)
        return vectors.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        inverse, padding = ctx.saved_tensors
        gradient = grad_outputs[0].index_select(0, inverse)
        return gradient if padding is None else gradient.index_fill_(0, padding, 0), None, None, None
