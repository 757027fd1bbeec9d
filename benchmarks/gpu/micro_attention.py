"""One layer's attention over a trie, forward and backward: what each variant costs, and how far it is from fp32."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

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
    describe_error,
    emit,
    forward_backward,
    median_ms,
    relative_distance,
    synchronize,
)
from benchmarks.gpu.variants import applied
from trainer.data.batching.micro_batch import MicroBatch, Tokens, collate_trie

# Rows, tokens that all share, tokens of each row's own, and by how many these vary at most.
FULL_CASES = {
    "unshared 16 x 512": (16, 0, 512, 0),
    "unshared, 256 to 768": (16, 0, 512, 256),
    "shared 1024 + 56 x 128": (56, 1024, 128, 64),
}
CASES = {name: tuple(max(n // SCALE, 1) if n else 0 for n in sizes) for name, sizes in FULL_CASES.items()}
VARIANTS = ("", "nocudnn", "nocudnn,packgqa", "varlen", "flex")
ATTENTION = "attention of one layer, 32/8 heads of 128, forward and backward"


def make_batch(rows: int, shared_tokens: int, own_tokens: int, spread: int) -> MicroBatch:
    """Collate rows of random ids into a trie; every token is in the loss."""
    random = np.random.default_rng(0)
    prefix = random.integers(0, 40000, shared_tokens, dtype=np.int32)
    examples = []
    for _ in range(rows):
        own = random.integers(0, 40000, own_tokens + int(random.integers(-spread, spread + 1)), dtype=np.int32)
        ids = np.concatenate([prefix, own])
        examples.append(Tokens(ids, np.ones(len(ids), dtype=bool)))
    return collate_trie(examples, range(rows))


def make_qkv(nodes: int, heads: int = 32, key_heads: int = 8, width: int = 128) -> list[Tensor]:
    """Return queries, keys and values, (1, heads, nodes, width), laid out as a rotary embedding leaves them."""
    torch.manual_seed(0)
    counts = (heads, key_heads, key_heads)
    return [torch.randn(1, nodes, n, width, device=DEVICE, dtype=DTYPE).transpose(1, 2) for n in counts]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend by the kernel that is in place now, inside a ``trie_context``."""
    return kernel.trie_attention(torch.nn.Module(), q, k, v, kernel.trie_mask(q.device))[0]


def attention() -> None:
    """Measure every case with every variant."""
    for case in CASES:
        try:
            expected = exact_gradients(case)
        except Exception as error:
            expected = None
            emit("micro", ATTENTION, case=case, variant="fp32", error=describe_error(error))
        for variant in VARIANTS:
            if variant == "flex" and case.startswith("unshared 16"):
                continue  # each shape is compiled for itself: seconds
            try:
                found = measure_attention(case, variant, expected)
            except Exception as error:
                found = {"error": describe_error(error)}
                traceback.print_exc()
            emit("micro", ATTENTION, case=case, variant=variant or "as it is", **found)


def exact_gradients(case: str) -> tuple[Tensor, ...]:
    """Return the gradients of the kernel as it is, in fp32, of the same inputs and output gradient."""
    batch = make_batch(*CASES[case]).to(DEVICE)
    with kernel.trie_context(batch.paths):
        return forward_backward(attend, [t.float() for t in make_qkv(batch.input_ids.numel())])()


def measure_attention(case: str, variant: str, expected: tuple[Tensor, ...] | None) -> dict[str, Any]:
    """Time one variant on one case, and compare its gradients with the exact ones."""
    is_flex = variant == "flex"
    with applied("" if is_flex else variant):
        make_batch(*CASES[case])
        build_cpu_ms, batch = elapsed_ms(lambda: make_batch(*CASES[case]))
        move_ms, batch = elapsed_ms(lambda: batch.to(DEVICE))
        inputs, memory = make_qkv(batch.input_ids.numel()), PeakMemory()
        begin = time.perf_counter()
        function = flex_attention(batch) if is_flex else attend
        with nullcontext() if is_flex else kernel.trie_context(batch.paths):
            call = forward_backward(function, inputs)
            gradients = call()
            synchronize()
            found = {
                "nodes": batch.input_ids.numel(),
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
    """Run a backward twice by each variant and compare to the bit."""
    for variant in ("", "nocudnn,packgqa", "varlen", "deterministic,nocudnn,packgqa", "deterministic,varlen"):
        try:
            with applied(variant):
                batch = make_batch(*CASES["shared 1024 + 56 x 128"]).to(DEVICE)
                with kernel.trie_context(batch.paths):
                    call = forward_backward(attend, make_qkv(batch.input_ids.numel()))
                    pairs, took = zip(call(), call(), strict=True), median_ms(call, 5)
            found = {"same_to_the_bit": [bool(torch.equal(*pair)) for pair in pairs], "both_ms": took}
        except Exception as error:
            found = {"error": describe_error(error)}
        emit("micro", "the trie's attention twice", variant=variant or "as it is", **found)
