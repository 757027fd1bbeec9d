"""Ask small questions of the GPU, one section after the other.

python -m benchmarks.gpu.micro [SECTION…]

peaks        matrix products and copies: what the device reaches
select       which kernel SDPA takes for a boolean mask, by dtype, grouped heads, and cuDNN allowed or not
plans        what the first call of a new shape costs, with cuDNN and without
attention    one layer's attention over three sets of rows: varlen, SDPA and FlexAttention, tries and padded
determinism  whether a repeated backward is the same to the bit
norms lora swiglu rope  one layer of each, afina's or Liger's beside transformers' and PEFT's own
loss         of 4096 labels, by the size of its chunks
sync         what the host does for a micro-batch and for a step besides the model
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from benchmarks.gpu.measure import (
    DEVICE,
    DTYPE,
    IS_CUDA,
    SCALE,
    cudnn_in_sdpa,
    describe_error,
    emit,
    median_ms,
    synchronize,
)
from benchmarks.gpu.micro_attention import KINDS, attention, determinism, make_batch
from benchmarks.gpu.micro_layers import lora, loss, norms, rope, swiglu
from trainer.data.batching.micro_batch import MicroBatch
from trainer.data.batching.trie_paths import TriePaths

BACKENDS = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn", -1: "error"}


def peaks() -> None:
    """Measure matrix products, of random numbers and of ones (which draw less power), and copies."""
    size = 8192 // SCALE
    for kind in ("randn", "ones"):
        a, b = (getattr(torch, kind)(size, size, device=DEVICE, dtype=DTYPE) for _ in range(2))
        emit("micro", f"matmul {kind}", tflops=2 * size**3 / median_ms(lambda a=a, b=b: a @ b) / 1e9)
    source = torch.randn((1 << 30) // SCALE**2, device=DEVICE, dtype=DTYPE)
    target = torch.empty_like(source)
    emit("micro", "copy", tb_s=2 * source.nbytes / median_ms(lambda: target.copy_(source)) / 1e9)


def select() -> None:
    """Ask SDPA which kernel it would take."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for grouped in (False, True):
            q = torch.randn(4, 8, 64, 64, device=DEVICE, dtype=dtype, requires_grad=True)
            k = torch.randn(4, 2 if grouped else 8, 96, 64, device=DEVICE, dtype=dtype, requires_grad=True)
            mask = torch.ones(4, 1, 64, 96, device=DEVICE, dtype=torch.bool).tril()
            for cudnn in (True, False):
                with cudnn_in_sdpa(cudnn):
                    choice = int(torch._fused_sdp_choice(q, k, k, mask, 0.0, False, enable_gqa=grouped))
                found = {"dtype": str(dtype)[6:], "gqa": grouped, "cudnn": cudnn}
                emit("micro", "SDPA with a bool mask takes", **found, backend=BACKENDS.get(choice, str(choice)))


def plans() -> None:
    """Time shapes that were never seen, forward and backward, against the same shapes again."""
    for cudnn in (True, False):
        with cudnn_in_sdpa(cudnn):
            pairs = [_first_and_again(k) for k in range(8 if IS_CUDA else 2)]
        middle = [sorted(times)[len(times) // 2] for times in zip(*pairs[1:], strict=True)]
        names = ("first_forward_ms", "first_backward_ms", "again_forward_ms", "again_backward_ms")
        found = dict(zip(names, middle, strict=True))
        emit("micro", "SDPA with mask and GQA, each shape new", cudnn=cudnn, **found)


def _first_and_again(number: int) -> list[float]:
    """Return ms of forward and backward of a shape of its own, the first time and the second."""
    keys, width = (520 + 24 * number) // (1 if IS_CUDA else 8), 128
    shapes = ((32, 96), (8, keys), (8, keys))
    q, k, v = (
        torch.randn(12 + number, heads, count, width, device=DEVICE, dtype=DTYPE, requires_grad=True)
        for heads, count in shapes
    )
    mask = torch.ones(12 + number, 1, 96, keys, device=DEVICE, dtype=torch.bool).tril()
    found = []
    for _ in range(2):
        synchronize()
        begin = time.perf_counter()
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        synchronize()
        between = time.perf_counter()
        out.backward(torch.ones_like(out))
        synchronize()
        found += [1e3 * (between - begin), 1e3 * (time.perf_counter() - between)]
    return found


def sync() -> None:
    """Time the host's work for a micro-batch (copies, orders, masks), and the test for finite gradients."""
    for name in ("trie, varlen", "trie, SDPA"):
        batch = make_batch("unshared, 256 to 768", KINDS[name])
        _move(batch)
        _move(batch)
        synchronize()
        begin = time.perf_counter()
        _move(batch)
        host = 1e3 * (time.perf_counter() - begin)
        synchronize()
        everything = 1e3 * (time.perf_counter() - begin)
        emit("micro", "a micro-batch to the device, its orders and masks", kind=name, host_ms=host, all_ms=everything)
    gradients = [torch.randn(16, 4096, device=DEVICE, dtype=DTYPE) for _ in range(448)]
    emit(
        "micro",
        "are 448 gradients finite",
        as_it_is_ms=median_ms(lambda: _are_finite([g.abs().amax().float() for g in gradients]), 5),
        foreach_ms=median_ms(lambda: _are_finite(torch._foreach_norm(gradients, math.inf)), 5),
    )


def _move(batch: MicroBatch) -> None:
    paths = batch.to(DEVICE).paths
    if isinstance(paths, TriePaths):
        paths.query_order(32)
        paths.key_indices(8)
        for bucket in paths.buckets:
            bucket.mask(None)


def _are_finite(norms_: Sequence[torch.Tensor]) -> bool:
    return bool(torch.isfinite(torch.stack(list(norms_))).all())


SECTIONS: dict[str, Callable[[], None]] = {
    "peaks": peaks,
    "select": select,
    "plans": plans,
    "attention": attention,
    "determinism": determinism,
    "norms": norms,
    "lora": lora,
    "swiglu": swiglu,
    "rope": rope,
    "loss": loss,
    "sync": sync,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections asked for; one that fails costs no other. Returns how many failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {' '.join(SECTIONS)}; none: all")
    asked = parser.parse_args(arguments).sections
    if unknown := set(asked) - set(SECTIONS):
        parser.error(f"no such section: {' '.join(sorted(unknown))}")
    begin, failed = time.perf_counter(), 0
    for name in asked or SECTIONS:
        try:
            SECTIONS[name]()
        except Exception as error:
            failed += 1
            emit("micro", name, error=describe_error(error))
            traceback.print_exc()
        print(f"-- {name}: {time.perf_counter() - begin:.1f} s since the start", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
