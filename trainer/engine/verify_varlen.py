"""Verify varlen attention alone, in 16 bits, where no run of the whole model can tell a small mistake from rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.data.batching.pieces import Pieces, trie_pieces
from trainer.data.batching.trie import build_trie
from trainer.engine.flops import layer_configs
from trainer.engine.verification import Verification, distances
from trainer.kernels.varlen_attention import attend_one_by_one, attend_pieces

SHARED, TAILS = 96, (33, 48, 80)  # tokens of a prefix, and of what follows it in each row


def verify_varlen(model: Any, dtype: torch.dtype, device: torch.device, window: int | None) -> Verification:
    """Compare outputs and gradients, in the model's heads and on a small trie, with the same in fp32.

    What is allowed is twice what SDPA in ``dtype``, piece by piece, is off.

    Args:
        model: of which the heads are taken.
        dtype: of 16 bits.
        device: where the model will run.
        window: of its layers with sliding-window attention, in tokens.
    """
    text = max(layer_configs(model.config.get_text_config()), key=_width)
    heads, width = text.num_attention_heads, _width(text)
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    on_host = _small_trie()
    pieces = on_host.with_tensors([t.to(device) for t in on_host.tensors()])
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, count, pieces.tokens, width, generator=generator).to(device, dtype)
        for count in (heads, key_heads, key_heads)
    ]
    outer = torch.randn(1, pieces.tokens, heads, width, generator=generator).to(device)
    exact = _through(attend_pieces, pieces, [t.float() for t in inputs], outer, window)
    plain = _through(_one_by_one, pieces, inputs, outer, window)
    try:
        found = _through(attend_pieces, pieces, inputs, outer, window)
    except Exception as error:  # of the kernel, which is left out then
        message = " ".join(str(error).split())[:200]
        return Verification(0.0, 0.0, dtype, error=f"varlen attention: {type(error).__name__}: {message}")
    allowed = 2 * distances(plain, exact)[1]
    off = distances(found, exact)[1]
    if off <= allowed:
        return Verification(0.0, 0.0, dtype)
    reason = f"varlen attention is {off:.1e} from fp32; {allowed:.1e} is allowed"
    return Verification(0.0, 0.0, dtype, error=reason)


def _width(layer: Any) -> int:
    """Return the width of a head, of a layer's config."""
    return int(getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads)


def _small_trie() -> Pieces:
    rows = [np.append(np.arange(SHARED), np.full(tail, SHARED + tail)).astype(np.int32) for tail in TAILS]
    return trie_pieces(build_trie(rows, [np.zeros(len(row), dtype=bool) for row in rows]))


def _one_by_one(
    pieces: Pieces, query: Tensor, key: Tensor, value: Tensor, window: int | None, scaling: float
) -> Tensor:
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    assert pieces.gathered is not None
    nodes = pieces.gathered.nodes
    return attend_one_by_one(pieces, window, scaling, q, k[nodes], v[nodes])[None]


def _through(
    attend: Any, pieces: Pieces, inputs: list[Tensor], outer: Tensor, window: int | None
) -> tuple[Tensor, list[Tensor]]:
    """Return a loss that is not looked at, and the outputs and gradients, in fp32."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    with torch.enable_grad():
        out = attend(pieces, *leaves, window, leaves[0].shape[-1] ** -0.5)
    gradients = torch.autograd.grad(out, leaves, outer.to(out.dtype))
    return torch.ones(()), [t.float() for t in (out.detach(), *gradients)]
