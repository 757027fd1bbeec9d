"""Compute the LoRA layers of several trials on one base: the base on all rows, low-rank products on each trial's own.

The rows of the trials stand one after another in the batch. Neighbours of one rank share batched products: a loop over
8 trials mostly takes as long or longer, up to three times in bf16 at 50 tokens a trial. On CUDA, where launches cost
most, neighbours of any ranks share them, filled up with zeros, which add exactly nothing; on CPU that would double the
time of ranks from 4 to 64 (torch 2.13, 2 cores).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from trainer.kernels.lora_linear import is_frozen_dense, is_lora_linear
from trainer.kernels.patch import Patch, patch_forwards
from trainer.kernels.selective_checkpoint import is_keeping, kept


@dataclass(slots=True)
class ActiveTrials:
    """The trials whose rows a forward has; the backward must find the same ones, since it may compute a layer again.

    Attributes:
        names: of their adapters, in the order of their rows: of ``len(names) * rows``, trial k owns those from
            ``k * rows`` to ``(k + 1) * rows``.
        same_tokens: whether the rows of each trial hold the same tokens, as in training; not while trials generate.
        shares_layers: whether layers may have the rows of one trial, for all of them (``share_lower_layers``).
    """

    names: tuple[str, ...]
    same_tokens: bool = False
    shares_layers: bool = False

    @contextlib.contextmanager
    def on_same_tokens(self) -> Iterator[None]:
        """Let the forwards and backwards inside be of the same tokens for each trial."""
        before, self.same_tokens = self.same_tokens, True
        try:
            yield
        finally:
            self.same_tokens = before


@dataclass(frozen=True, slots=True)
class Bucket:
    """Neighbouring trials that share batched products.

    Attributes:
        first: its place among the active trials.
        ranks: of each of them.
        scalings: of their low-rank products.
    """

    first: int
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]

    def own(self, by_trial: Tensor) -> Tensor:
        """Return the view of a tensor (trials, …) that is these trials'."""
        return by_trial[self.first : self.first + len(self.ranks)]


def patch_trial_linears(model: nn.Module, active: ActiveTrials) -> Patch | None:
    """Patch the LoRA layers of a PEFT model, so that each of the active trials adapts its own rows alone.

    A layer that a trial does not adapt adds nothing for it.

    Args:
        model: with an adapter a trial, in each of which dropout and bias are off and no variant (DoRA) is on.
        active: looked at in each forward.

    Returns:
        the patch, applied; ``None`` where there is no such layer.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        assert is_lora_linear(layer), f"{type(layer).__name__} would adapt the rows of all trials"
        assert not layer.lora_variant, "a variant of LoRA has no such kernel"
        assert all(type(dropout) is nn.Identity for dropout in layer.lora_dropout.values()), "dropout is off"
        assert all(b.bias is None for b in layer.lora_B.values()), "low-rank products have no bias"
    return patch_forwards([(layer, partial(_forward, layer, active)) for layer in layers])


def pads_ranks(x: Tensor) -> bool:
    """Return whether trials of unlike rank share a product: on CUDA. On CPU the zeros cost more than the calls."""
    return x.is_cuda


def _forward(layer: Any, active: ActiveTrials, x: Tensor) -> Tensor:
    if layer.disable_adapters:
        return type(layer).forward(layer, x)
    assert not layer.merged, "no adapter of a group is merged into its base"
    base, buckets, weights = layer.base_layer, *_buckets(layer, active.names, pads_ranks(x))
    if not buckets:
        return base(x)
    assert len(x) % len(active.names) == 0, f"{len(x)} rows are of {len(active.names)} trials"
    cast = x
    if torch.is_autocast_enabled(x.device.type):
        cast, *weights = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (x, *weights))
    # Under ZeRO-3 a matrix that is not persistent is gathered by its own module's call only.
    if any(weight.dtype != cast.dtype or not weight.numel() for weight in weights):
        return _add_by_modules(layer, active.names, x, base(x))
    if is_frozen_dense(base, cast):
        return TrialsLinear.apply(cast, base.weight, base.bias, len(active.names), buckets, *weights)
    result = base(x)
    if result.dtype != cast.dtype:
        return _add_by_modules(layer, active.names, x, result)
    return AddTrials.apply(result, cast, len(active.names), buckets, *weights)


def _buckets(layer: Any, names: Sequence[str], pads: bool) -> tuple[list[Bucket], list[Tensor]]:
    """Return the buckets of the trials that adapt a layer, and their A and B in turn."""
    adapting = [(place, name, layer.r[name]) for place, name in enumerate(names) if name in layer.lora_A]
    buckets, weights = [], []
    # what neighbours have in common: the same distance between their places among all and among those that adapt
    common = groupby(enumerate(adapting), lambda item: (item[1][0] - item[0], None if pads else item[1][2]))
    for _, group in common:
        members = [member for _, member in group]
        scalings = tuple(float(layer.scaling[name]) for _, name, _ in members)
        buckets.append(Bucket(members[0][0], tuple(rank for _, _, rank in members), scalings))
        for _, name, _ in members:
            weights += [layer.lora_A[name].weight, layer.lora_B[name].weight]
    return buckets, weights


def _add_by_modules(layer: Any, names: Sequence[str], x: Tensor, result: Tensor) -> Tensor:
    """Add to the output of the base, (rows, …, out), what the modules of each trial's adapter give, as PEFT does."""
    rows = len(x) // len(names)
    parts = []
    for name, own_x, own in zip(names, x.split(rows), result.split(rows), strict=True):
        if name in layer.lora_A:
            a, b = layer.lora_A[name], layer.lora_B[name]
            own = (own + b(a(own_x.to(a.weight.dtype))) * layer.scaling[name]).to(result.dtype)
        parts.append(own)
    return torch.cat(parts)


class TrialsLinear(torch.autograd.Function):
    """Computes ``x W' + bias + s (x A') B'`` with W and bias frozen, and A, B and s each trial's own."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, trials: int, buckets: list[Bucket], *weights: Tensor
    ) -> Tensor:
        """Return (rows, …, out).

        Args:
            x: (rows, …, in), rows divisible by ``trials``.
            w: (out, in), the layer's own weight.
            bias: (out,), the layer's own.
            trials: whose rows stand one after another.
            buckets: of those that adapt the layer.
            weights: A (r, in) and B (out, r) of each of their trials in turn.
        """
        out = kept(lambda: nn.functional.linear(x, w, bias))
        if is_keeping():  # what is kept is the product as it was
            out = out.clone()
        ctx.save_for_backward(x, w, *_add_products(out, x, trials, buckets, weights))
        ctx.trials, ctx.buckets = trials, buckets
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, w, *saved = ctx.saved_tensors
        grad_x = grad_outputs[0] @ w if ctx.needs_input_grad[0] else None
        gradients = _low_rank_gradients(grad_outputs[0], x, grad_x, ctx.trials, ctx.buckets, saved)
        return grad_x, None, None, None, None, *gradients


class AddTrials(torch.autograd.Function):
    """Adds ``s (x A') B'`` of each trial to its rows of any layer's output: quantised, partitioned by ZeRO-3."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, x: Tensor, trials: int, buckets: list[Bucket], *weights: Tensor) -> Tensor:
        """Return (rows, …, out); ``result``: (rows, …, out), the rest as in :class:`TrialsLinear`."""
        out = result.clone(memory_format=torch.contiguous_format)
        ctx.save_for_backward(x, *_add_products(out, x, trials, buckets, weights))
        ctx.trials, ctx.buckets = trials, buckets
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format) if ctx.needs_input_grad[1] else None
        gradients = _low_rank_gradients(grad_outputs[0], x, grad_x, ctx.trials, ctx.buckets, saved)
        return grad_outputs[0], grad_x, None, None, *gradients


def _add_products(
    out: Tensor, x: Tensor, trials: int, buckets: Sequence[Bucket], weights: Sequence[Tensor]
) -> list[Tensor]:
    """Add the low-rank products to ``out`` in place; return A, B and ``s x A'`` of each bucket in turn."""
    out, x = (t.view(trials, -1, t.shape[-1]) for t in (out, x.contiguous()))
    saved, left = [], list(weights)
    for bucket in buckets:
        count = len(bucket.ranks)
        a, b = _stack(left[: 2 * count : 2], left[1 : 2 * count : 2])
        left = left[2 * count :]
        inner = torch.bmm(bucket.own(x), a.transpose(1, 2)).mul_(_column(bucket.scalings, x.device, x.dtype))
        bucket.own(out).baddbmm_(inner, b.transpose(1, 2))
        saved += [a, b, inner]
    return saved


def _low_rank_gradients(
    gradient: Tensor, x: Tensor, grad_x: Tensor | None, trials: int, buckets: Sequence[Bucket], saved: Sequence[Tensor]
) -> list[Tensor]:
    """Return the gradients of A and B of each trial in turn, and add those of x to ``grad_x`` in place."""
    gradient, x = (t.reshape(trials, -1, t.shape[-1]) for t in (gradient, x))
    gradients = []
    for bucket, a, b, inner in zip(buckets, saved[::3], saved[1::3], saved[2::3], strict=True):
        own = bucket.own(gradient)
        inner_gradient = torch.bmm(own, b).mul_(_column(bucket.scalings, x.device, x.dtype))
        if grad_x is not None:
            bucket.own(grad_x.view_as(x)).baddbmm_(inner_gradient, a)
        grad_a = torch.bmm(inner_gradient.transpose(1, 2), bucket.own(x))
        grad_b = torch.bmm(own.transpose(1, 2), inner)
        for trial, rank in enumerate(bucket.ranks):
            gradients += [grad_a[trial, :rank], grad_b[trial, :, :rank]]
    return gradients


def _stack(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return A (trials, r, in) and B (trials, out, r) of a bucket, lower ranks filled up with zeros."""
    rank, zeros_a, zeros_b = max(map(len, a)), a[0].new_zeros, b[0].new_zeros
    rows = [t for one in a for t in (one, zeros_a(rank - len(one), one.shape[1]))]
    columns = [t for one in b for t in (one, zeros_b(len(one), rank - one.shape[1]))]
    stacked = torch.cat(columns, dim=1).view(len(b[0]), len(b), rank)
    return torch.cat(rows).view(len(a), rank, -1), stacked.transpose(0, 1)


@functools.cache
def _column(scalings: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return scalings as (trials, 1, 1); kept, because a GPU is waited for when they are sent there."""
    wide = torch.promote_types(dtype, torch.float32)  # as a number that multiplies a tensor of 16 bits
    return torch.tensor(scalings, dtype=wide, device=device)[:, None, None]
