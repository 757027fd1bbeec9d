"""One layer's attention over rows, forward and backward: what each way costs, and how far it is from fp32."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import trainer.kernels.trie_attention as kernel
from benchmarks.gpu.measure import (
    DEVICE,
    DTYPE,
    IS_CUDA,
    SCALE,
    PeakMemory,
    cudnn_in_sdpa,
    describe_error,
    emit,
    forward_backward,
    median_ms,
    relative_distance,
    synchronize,
)
from trainer.data.batching.micro_batch import MicroBatch, Tokens, collate_padded, collate_trie
from trainer.data.batching.pieces import Pieces
from trainer.kernels.deterministic import use_deterministic_kernels
from trainer.kernels.varlen_attention import attend_pieces

# Rows, tokens that all share, tokens of each row's own, and by how many these vary at most.
FULL_CASES = {
    "unshared 16 x 512": (16, 0, 512, 0),
    "unshared, 256 to 768": (16, 0, 512, 256),
    "shared 1024 + 56 x 128": (56, 1024, 128, 64),
}
CASES = {name: tuple(max(n // SCALE, 1) if n else 0 for n in sizes) for name, sizes in FULL_CASES.items()}
ATTENTION = "attention of one layer, 32/8 heads of 128, forward and backward"
HEADS = (32, 8)


@dataclass(frozen=True, slots=True)
class Kind:
    """A way to attend.

    Attributes:
        padded: rows side by side; else a trie.
        in_pieces: laid out for varlen calls; else for SDPA with masks.
        packs: the query heads of a key head lie side by side, as ``packs_query_heads`` does it on CUDA; else SDPA is
            told that they share it.
        cudnn: SDPA may take cuDNN.
        is_flex: FlexAttention, which afina has not.
    """

    padded: bool = False
    in_pieces: bool = False
    packs: bool = True
    cudnn: bool = False
    is_flex: bool = False


KINDS = {
    "trie, varlen": Kind(in_pieces=True),
    "trie, SDPA": Kind(),
    "trie, SDPA, enable_gqa": Kind(packs=False),
    "trie, SDPA, enable_gqa, cuDNN": Kind(packs=False, cudnn=True),
    "padded, varlen": Kind(padded=True, in_pieces=True),
    "padded, SDPA": Kind(padded=True),
    "padded, SDPA, cuDNN": Kind(padded=True, cudnn=True),
    "trie, FlexAttention": Kind(is_flex=True),
}


def make_batch(case: str, kind: Kind) -> MicroBatch:
    """Collate rows of random ids in the layout of a kind; every token is in the loss."""
    rows, shared_tokens, own_tokens, spread = CASES[case]
    random = np.random.default_rng(0)
    prefix = random.integers(0, 40000, shared_tokens, dtype=np.int32)
    examples = []
    for _ in range(rows):
        own = random.integers(0, 40000, own_tokens + int(random.integers(-spread, spread + 1)), dtype=np.int32)
        ids = np.concatenate([prefix, own])
        examples.append(Tokens(ids, np.ones(len(ids), dtype=bool)))
    if kind.padded:
        return collate_padded(examples, range(rows), 0, in_pieces=kind.in_pieces)
    return collate_trie(examples, range(rows), in_pieces=kind.in_pieces)


def make_qkv(batch: MicroBatch, heads: tuple[int, int] = HEADS, width: int = 128) -> list[Tensor]:
    """Return queries, keys and values, (rows, heads, tokens, width), laid out as a rotary embedding leaves them."""
    torch.manual_seed(0)
    rows, tokens = batch.input_ids.shape
    counts = (heads[0], heads[1], heads[1])
    return [torch.randn(rows, tokens, n, width, device=DEVICE, dtype=DTYPE).transpose(1, 2) for n in counts]


def attend(batch: MicroBatch, kind: Kind) -> Callable[..., Tensor]:
    """Return afina's attention over a batch on the device, of queries, keys and values; padding gives zero."""
    paths, mask = batch.paths, kernel.trie_mask(DEVICE)
    if isinstance(paths, Pieces):
        real = batch.attention_mask[:, :, None, None]
        return lambda q, k, v: attend_pieces(paths, q, k, v, None, q.shape[-1] ** -0.5) * real
    if kind.padded:
        return _attend_padded(batch)
    return lambda q, k, v: kernel.trie_attention(torch.nn.Module(), q, k, v, mask)[0]


def _attend_padded(batch: MicroBatch) -> Callable[..., Tensor]:
    """Return transformers' SDPA with the mask that it is given for padded rows: none where nothing is padded."""
    real, width = batch.attention_mask.bool(), batch.input_ids.shape[1]
    causal = torch.ones(width, width, device=DEVICE, dtype=torch.bool).tril()
    mask = None if real.all() else causal & real[:, None, None, :]
    layer: Any = torch.nn.Module()

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layer.num_key_value_groups = q.shape[1] // k.shape[1]
        return kernel.SDPA(layer, q, k, v, mask, scaling=q.shape[-1] ** -0.5)[0] * real[:, :, None, None]

    return function


@contextlib.contextmanager
def settings_of(kind: Kind, batch: MicroBatch) -> Iterator[None]:
    """Attend by this kind's settings inside the ``with`` block."""
    with (
        cudnn_in_sdpa(kind.cudnn),
        mock.patch.object(kernel, "packs_query_heads", return_value=kind.packs),
        kernel.trie_context(None if kind.padded or kind.in_pieces else batch.paths),
    ):
        yield


def attention() -> None:
    """Measure every case with every kind."""
    for case in CASES:
        exact: dict[bool, tuple[Tensor, ...]] = {}
        for padded, name in ((False, "trie, SDPA"), (True, "padded, SDPA")):
            try:
                exact[padded] = exact_gradients(case, KINDS[name])
            except Exception as error:
                emit("micro", ATTENTION, case=case, kind=f"{name}, fp32", error=describe_error(error))
        for name, kind in KINDS.items():
            if kind.is_flex and case.startswith("unshared 16"):
                continue  # each shape is compiled for itself: seconds
            try:
                found = measure_attention(case, kind, exact.get(kind.padded))
            except Exception as error:
                found = {"error": describe_error(error)}
                traceback.print_exc()
            emit("micro", ATTENTION, case=case, kind=name, **found)


def exact_gradients(case: str, kind: Kind) -> tuple[Tensor, ...]:
    """Return the gradients in fp32, of the same inputs and output gradient."""
    batch = make_batch(case, kind).to(DEVICE)
    with settings_of(kind, batch):
        return forward_backward(attend(batch, kind), [t.float() for t in make_qkv(batch)])()


def measure_attention(case: str, kind: Kind, expected: tuple[Tensor, ...] | None) -> dict[str, Any]:
    """Time one kind on one case, and compare its gradients with the exact ones."""
    make_batch(case, kind)
    build_cpu_ms, batch = elapsed_ms(lambda: make_batch(case, kind))
    move_ms, batch = elapsed_ms(lambda: batch.to(DEVICE))
    inputs, memory = make_qkv(batch), PeakMemory()
    begin = time.perf_counter()
    function = flex_attention(batch) if kind.is_flex else attend(batch, kind)
    with settings_of(kind, batch):
        call = forward_backward(function, inputs)
        gradients = call()
        synchronize()
        found = {
            "tokens": batch.computed_tokens,
            "first_s": time.perf_counter() - begin,
            "forward_ms": median_ms(lambda: function(*inputs), 10),
            "both_ms": median_ms(call, 10),
            "build_cpu_ms": build_cpu_ms,
            "move_ms": move_ms,
            "peak_gib": memory.gib(),
            "kernels": count_kernels(call),
        }
    if expected is not None:
        found["far_from_fp32"] = max(relative_distance(*pair) for pair in zip(gradients, expected, strict=True))
    return found


def elapsed_ms(function: Callable[[], Any]) -> tuple[float, Any]:
    """Return the wall time of one call between two synchronisations, and its result."""
    synchronize()
    begin = time.perf_counter()
    result = function()
    synchronize()
    return 1e3 * (time.perf_counter() - begin), result


def count_kernels(call: Callable[[], Any]) -> int:
    """Return how many kernels a call launches; 0 on a CPU."""
    if not IS_CUDA:
        return 0
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        synchronize()
    return sum(e.count for e in profiled.key_averages() if str(e.device_type).endswith("CUDA"))


def flex_attention(batch: MicroBatch) -> Callable[..., Tensor]:
    """Return FlexAttention over the trie as one row, compiled for its shape.

    Node q sees node k iff ``k <= q < subtree_end[k]``: the nodes in between are below k.
    """
    from torch.nn.attention import flex_attention as flex

    if not IS_CUDA:
        raise RuntimeError("FlexAttention has no backward on a CPU")
    assert batch.position_ids is not None
    subtree_end = torch.tensor(subtree_ends(batch.position_ids[0].tolist()), device=DEVICE)
    nodes = len(subtree_end)

    def sees(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < subtree_end[key])

    block_mask = flex.create_block_mask(sees, None, None, nodes, nodes, device=DEVICE)
    compiled = torch.compile(flex.flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask, enable_gqa=True).transpose(1, 2)


def subtree_ends(depths: list[int]) -> list[int]:
    """Return, for each node in depth-first order, the next node that is not below it."""
    ends, open_nodes = [len(depths)] * len(depths), []
    for node, depth in enumerate(depths):
        while open_nodes and depths[open_nodes[-1]] >= depth:
            ends[open_nodes.pop()] = node
        open_nodes.append(node)
    return ends


def determinism() -> None:
    """Run a backward twice by the kinds that a run takes, as torch likes and deterministic, and compare to the bit."""
    for deterministic in (False, True):
        for name in ("trie, varlen", "trie, SDPA"):
            try:
                with _deterministic_kernels(deterministic):
                    found = _twice("shared 1024 + 56 x 128", KINDS[name])
            except Exception as error:
                found = {"error": describe_error(error)}
            emit("micro", "the trie's attention twice", kind=name, deterministic=deterministic, **found)


@contextlib.contextmanager
def _deterministic_kernels(wanted: bool) -> Iterator[None]:
    if wanted:
        use_deterministic_kernels()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _twice(case: str, kind: Kind) -> dict[str, Any]:
    batch = make_batch(case, kind).to(DEVICE)
    with settings_of(kind, batch):
        call = forward_backward(attend(batch, kind), make_qkv(batch))
        pairs, took = zip(call(), call(), strict=True), median_ms(call, 5)
        return {"same_to_the_bit": [bool(torch.equal(*pair)) for pair in pairs], "both_ms": took}
