"""What might be changed in afina for the GPU: each a patch of the running process, to be timed beside what it replaces.

nocudnn        SDPA never takes cuDNN, which builds a plan for each new shape
packgqa        the query heads of one key head side by side as queries: SDPA needs no enable_gqa beside a mask
varlen         the trie's attention in one call of torch.nn.attention.varlen: no buckets, masks, padding or reordering
rms            torch's fused RMSNorm in place of the written-out one
lora           LoRA's product added in place by addmm, scaled on the side that is r wide (frozen dense bases)
chunk          eight times as many logits in a chunk of the loss
expandable     PyTorch's expandable segments: set by campaign.sh in the environment, named here for the record
deterministic  torch.use_deterministic_algorithms

They reach into afina's kernels by name; tests/unit/test_gpu_campaign.py fails when such a name goes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import trainer.kernels.label_loss as label_loss
import trainer.kernels.rms_norm as rms_norm
import trainer.kernels.trie_attention as trie_attention
from benchmarks.gpu import varlen


@contextlib.contextmanager
def applied(names: str) -> Iterator[None]:
    """Patch this process with some variants inside the ``with`` block.

    Args:
        names: separated by commas, applied in this order; empty: nothing is changed.
    """
    with contextlib.ExitStack() as undo:
        for name in filter(None, names.split(",")):
            VARIANTS[name](undo)
        yield


def replace(undo: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until ``undo`` closes. Raises AttributeError where there is none of this name."""
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _no_cudnn(undo: contextlib.ExitStack) -> None:
    undo.callback(torch.backends.cuda.enable_cudnn_sdp, torch.backends.cuda.cudnn_sdp_enabled())
    torch.backends.cuda.enable_cudnn_sdp(False)


def _expandable(_: contextlib.ExitStack) -> None:
    """Nothing to patch: the allocator reads its settings from the environment when the process starts."""


def _deterministic(undo: contextlib.ExitStack) -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    undo.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
    torch.use_deterministic_algorithms(True)


def _chunk(undo: contextlib.ExitStack) -> None:
    replace(undo, label_loss, "CHUNK_ELEMENTS", label_loss.CHUNK_ELEMENTS << 3)


def _rms(undo: contextlib.ExitStack) -> None:
    def forward(module: Any, eps: float, hidden_states: Tensor) -> Tensor:
        weight = module.weight.to(hidden_states.dtype)
        return F.rms_norm(hidden_states, (hidden_states.shape[-1],), weight, eps)

    replace(undo, rms_norm, "_forward", forward)


def _pack_gqa(undo: contextlib.ExitStack) -> None:
    def attend(
        at: Tensor, mask: Tensor, scaling: float, dropout: float, q: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        rows, _, queries, count = mask.shape
        k, v = (trie_attention._Gather.apply(t, at).view(rows, -1, count, t.shape[-1]) for t in (keys, values))
        groups = q.shape[1] // k.shape[1]
        packed = q.reshape(rows, k.shape[1], groups * queries, q.shape[-1])
        wide = mask.repeat(1, 1, groups, 1)
        out = F.scaled_dot_product_attention(packed, k, v, attn_mask=wide, dropout_p=dropout, scale=scaling)
        return out.reshape(rows, -1, queries, v.shape[-1])

    replace(undo, trie_attention, "_attend_bucket", attend)


def _varlen(undo: contextlib.ExitStack) -> None:
    import trainer.data.batching.micro_batch as micro_batch

    replace(undo, micro_batch, "build_paths", varlen.build_paths)
    replace(undo, trie_attention, "trie_attention", varlen.trie_attention)


class LoraLinear(torch.autograd.Function):
    """``x W' + b + s (x A') B'`` with the second product added in place; W is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """Return (…, out). ``x``: (…, in); ``w``: (out, in); ``a``: (r, in); ``b``: (out, r)."""
        flat = x.reshape(-1, x.shape[-1])
        out = F.linear(flat, w, bias)
        inner = flat @ a.t()
        out.addmm_(inner, b.t(), alpha=scale)
        ctx.save_for_backward(flat, w, a, b, inner)
        ctx.scale, ctx.shape = scale, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, A and B."""
        flat, w, a, b, inner = ctx.saved_tensors
        gradient = outer[0].reshape(-1, w.shape[0])
        inner_gradient = (gradient @ b).mul_(ctx.scale)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = (gradient @ w).addmm_(inner_gradient, a).view(ctx.shape)
        return x_gradient, None, None, inner_gradient.t() @ flat, (gradient.t() @ inner).mul_(ctx.scale), None


def _is_plain_lora(layer: Any, x: Tensor) -> bool:
    """Whether a PEFT layer is one active LoRA without dropout on a frozen dense base of the input's dtype."""
    if layer.merged or layer.disable_adapters or len(layer.active_adapters) != 1 or layer.lora_variant:
        return False
    base, dropout = layer.base_layer, layer.lora_dropout[layer.active_adapters[0]]
    is_dense = type(base) is torch.nn.Linear and x.dtype == base.weight.dtype
    return is_dense and isinstance(dropout, torch.nn.Identity) and not torch.is_autocast_enabled(x.device.type)


def _lora(undo: contextlib.ExitStack) -> None:
    from peft.tuners.lora import layer

    peft_forward = layer.Linear.forward

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not _is_plain_lora(self, x):
            return peft_forward(self, x, *args, **kwargs)
        name, base = self.active_adapters[0], self.base_layer
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return LoraLinear.apply(x, base.weight, base.bias, a, b, self.scaling[name])

    replace(undo, layer.Linear, "forward", forward)


VARIANTS: dict[str, Callable[[contextlib.ExitStack], None]] = {
    "nocudnn": _no_cudnn,
    "packgqa": _pack_gqa,
    "varlen": _varlen,
    "rms": _rms,
    "lora": _lora,
    "chunk": _chunk,
    "expandable": _expandable,
    "deterministic": _deterministic,
}
