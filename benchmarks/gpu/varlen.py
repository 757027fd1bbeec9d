"""The trie's attention as one call of ``torch.nn.attention.varlen``: the variant ``varlen``.

Each stretch of new nodes is a sequence of queries whose keys are its whole path from the root. A causal mask that is
aligned to the last key is then exactly the trie's, so nothing is padded, bucketed, masked or reordered.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import trainer.kernels.trie_attention as kernel
from trainer.data.batching.trie import Trie
from trainer.data.batching.trie_paths import TriePaths


@dataclass(slots=True)
class RaggedPaths(TriePaths):
    """How the nodes of a trie attend, sequence after sequence.

    Attributes:
        query_ends, key_ends: cumulative lengths of the sequences' queries and keys, from 0, int32 (sequences + 1,).
        key_nodes: the node of each key, int64; ``None`` where nothing is shared and keys are the nodes themselves.
        most_queries, most_keys: of one sequence.
    """

    query_ends: Any = None
    key_ends: Any = None
    key_nodes: Any = None
    most_queries: int = 0
    most_keys: int = 0

    def tensors(self) -> list[Tensor]:
        """Return all tensors, in the order that :meth:`with_tensors` takes them."""
        return [self.place, self.query_ends, self.key_ends, *([] if self.key_nodes is None else [self.key_nodes])]

    def with_tensors(self, tensors: Sequence[Tensor]) -> RaggedPaths:
        """Return the same with other tensors in the places of its own."""
        names = ("place", "query_ends", "key_ends", "key_nodes")
        return dataclasses.replace(self, **dict(zip(names, tensors, strict=False)))

    @classmethod
    def from_lengths(cls, queries: list[int], keys: list[int], key_nodes: Tensor | None) -> RaggedPaths:
        """Build from the lengths of each sequence."""
        query_ends, key_ends = (
            torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32) for lengths in (queries, keys)
        )
        return cls(
            [],
            torch.arange(sum(queries)),
            torch.empty(3, 0, dtype=torch.int64),
            query_ends=query_ends,
            key_ends=key_ends,
            key_nodes=key_nodes,
            most_queries=max(queries),
            most_keys=max(keys),
        )


def build_paths(trie: Trie) -> RaggedPaths:
    """Cut a trie into one sequence an example: its new nodes attend to its path from the root."""
    keys = [len(path) for path in trie.paths]
    queries = [count - shared for count, shared in zip(keys, trie.shared, strict=True)]
    key_nodes = torch.from_numpy(np.concatenate(trie.paths)) if sum(keys) != len(trie.ids) else None
    return RaggedPaths.from_lengths(queries, keys, key_nodes)


def trie_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend over a trie; arguments and result are those of afina's own kernel."""
    kernel._check_context(query, attention_mask)
    if not kernel._paths:
        return kernel.SDPA(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others)
    paths = kernel._paths[-1]
    assert isinstance(paths, RaggedPaths), "the batch was made before the variant was applied"
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (t.to(torch.get_autocast_dtype(query.device.type)) for t in (query, key, value))
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    if paths.key_nodes is not None:
        k, v = (kernel._Gather.apply(t.flatten(1), paths.key_nodes).view(-1, *t.shape[1:]) for t in (k, v))
    return attend(q, k.contiguous(), v.contiguous(), paths, scaling, sliding_window)[None], None


def attend(q: Tensor, k: Tensor, v: Tensor, paths: RaggedPaths, scaling: float, window: int | None) -> Tensor:
    """Attend sequence by sequence, causal to the last key: (tokens, heads, width).

    The fused kernel has 16 bits only. On a CPU, and in the start-up verification's fp32, SDPA takes them one by one.
    """
    if not (q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)):
        return torch.cat(list(_attend_one_by_one(q, k, v, paths, scaling, window)))
    from torch.nn.attention.varlen import varlen_attn

    # later versions of torch share key heads themselves only when asked to
    grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters
    extra = {"enable_gqa": q.shape[1] != k.shape[1]} if grouped else {}
    sizes = paths.query_ends, paths.key_ends, paths.most_queries, paths.most_keys
    left = -1 if window is None else window - 1
    return varlen_attn(q, k, v, *sizes, scale=scaling, window_size=(left, 0), **extra)


def _attend_one_by_one(
    q: Tensor, k: Tensor, v: Tensor, paths: RaggedPaths, scaling: float, window: int | None
) -> Iterator[Tensor]:
    stretches = zip(pairwise(paths.query_ends.tolist()), pairwise(paths.key_ends.tolist()), strict=True)
    for (begin, end), (first, last) in stretches:
        depth = torch.arange(last - first, device=q.device)
        own = depth[-(end - begin) :, None]
        mask = depth <= own
        if window is not None:
            mask &= own - depth < window
        rows = (t.transpose(0, 1)[None] for t in (q[begin:end], k[first:last], v[first:last]))
        one = F.scaled_dot_product_attention(*rows, attn_mask=mask, scale=scaling, enable_gqa=True)
        yield one[0].transpose(0, 1)
