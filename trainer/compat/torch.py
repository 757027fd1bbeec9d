"""torch: what a CPU multiplies, a fused backward, and leaving beside gloo's threads."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

from trainer.compat import need, reach

if TYPE_CHECKING:
    from torch import Tensor


@reach(
    "torch.cpu._is_avx512_bf16_supported, torch.cpu._is_amx_tile_supported, torch.ops.mkldnn._is_mkldnn_bf16_supported",
    upstream="https://github.com/pytorch/pytorch/pull/100164 (names AVX512, but not its bf16)",
    until="torch.backends.cpu says whether bf16 is multiplied by the hardware",
)
def cpu_multiplies_bf16() -> bool:
    """Return whether the hardware does matrix products in bf16 (AVX512-BF16, AMX or Arm's BF16).

    Elsewhere they are emulated and slower than in fp32. oneDNN's own answer is yes on any AVX512.
    """
    import torch

    if platform.machine() in ("x86_64", "AMD64"):
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@reach("torch.ops.mkldnn._is_mkldnn_fp16_supported", until="as cpu_multiplies_bf16, of fp16")
def cpu_multiplies_fp16() -> bool:
    """Return whether this CPU has fp16 arithmetic; without it a product in fp16 is an error or takes minutes."""
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


@reach("torch.ops.aten._softmax_backward_data", until="torch.nn.functional has the backward of a softmax")
def softmax_backward(gradient: Tensor, probabilities: Tensor) -> Tensor:
    """Return the gradient of a softmax's input over the last dimension, in the dtype of ``probabilities``.

    Fused, it reads the 16-bit tensors once and computes in fp32.

    Args:
        gradient: of the softmax's output, (…, width).
        probabilities: that output.
    """
    import torch

    return torch.ops.aten._softmax_backward_data(gradient, probabilities, -1, probabilities.dtype)


@reach(
    "atexit._run_exitfuncs",
    upstream="https://github.com/pytorch/pytorch/issues/190489",
    until="gloo's threads no longer take the GIL while Python is taken down",
)
def run_exit_handlers() -> None:
    """Run what was registered with ``atexit``, for a process that ends by ``os._exit``.

    Gloo's threads outlive ``destroy_process_group``, and one that lets go of a tensor while the interpreter goes away
    aborts a process whose work is done.
    """
    import atexit

    atexit._run_exitfuncs()


@reach("module._compiled_call_impl", until="nn.Module can take back its compile()")
def uncompile_module(module: Any) -> None:
    """Take a module's own ``compile()`` back; its next call runs eagerly."""
    need("torch", module, "_compiled_call_impl")
    module._compiled_call_impl = None


@reach(
    "torch._C._distributed_c10d._dump_nccl_trace, ._dump_fr_trace",
    until="torch.distributed can dump its flight recorder without waiting for a timeout of its own",
)
def dump_collectives() -> bytes:
    """Return what the flight recorder has of this process's last collectives (NCCL's; gloo's on a CPU), as torch's
    ``torchfrtrace`` reads it; empty where this torch has no recorder."""
    import torch

    c10d = torch._C._distributed_c10d
    dump = getattr(c10d, "_dump_nccl_trace", None) or getattr(c10d, "_dump_fr_trace", None)
    return b"" if dump is None else bytes(dump())
