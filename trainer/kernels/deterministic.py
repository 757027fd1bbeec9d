"""Take deterministic kernels alone, for a run that gives the same bits each time."""

from __future__ import annotations

import os

import torch


def use_deterministic_kernels() -> None:
    """Let torch take the deterministic form of each operation, or raise where there is none.

    Call it before the first CUDA operation: cuBLAS reads its workspace's setting once. An operation without a
    deterministic form raises in the start-up verification, and the kernel that uses it is left out.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # filling fresh memory finds reads of what was never written; it costs a pass over each tensor
    torch.utils.deterministic.fill_uninitialized_memory = False
