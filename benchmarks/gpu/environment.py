"""Print what this machine is: versions, the GPU, DeepSpeed's accelerator, and whether bitsandbytes' kernels run.

python -m benchmarks.gpu.environment
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.gpu.measure import IS_CUDA, emit, relative_distance

PACKAGES = (
    *("torch", "triton", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "tokenizers", "datasets"),
    *("numpy", "pyarrow", "hydra-core", "omegaconf", "trl", "liger-kernel", "pytest", "pytest-xdist", "flash-attn"),
)
COMPILERS = ("cc", "gcc", "clang", "c++", "ptxas")
NVIDIA_SMI = "--query-gpu=clocks.sm,clocks.mem,power.limit,driver_version"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line a question."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args(arguments)
    emit("env", "date", day=datetime.date.today().isoformat())
    emit("env", "versions", python=sys.version.split()[0], cpus=os.cpu_count(), **versions())
    # Triton builds its launchers with a C compiler, torch.compile its code for a CPU with one of C++
    emit("env", "compilers", **{name: shutil.which(name) is not None for name in COMPILERS})
    if IS_CUDA:
        emit("env", "gpu", **gpu())
    from deepspeed.accelerator import get_accelerator

    emit("env", "DeepSpeed's accelerator", name=get_accelerator().device_name())
    if IS_CUDA:
        emit("env", "bitsandbytes nf4, there and back", far=nf4_distance())


def versions() -> dict[str, str | None]:
    """Return the version of each package; ``None``: not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def gpu() -> dict[str, Any]:
    """Return name, memory, library versions, and what nvidia-smi says of clocks, power and driver."""
    properties = torch.cuda.get_device_properties(0)
    command = ["nvidia-smi", NVIDIA_SMI, "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return {
        "gpu": properties.name,
        "gib": properties.total_memory / 2**30,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "clocks_power_driver": answer.stdout.strip(),
    }


def nf4_distance() -> float:
    """Return how far a matrix comes back from 4 bits; about 0.1 where the kernels work."""
    from bitsandbytes import functional

    weight = torch.randn(256, 256, device="cuda", dtype=torch.bfloat16)
    quantized, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return relative_distance(functional.dequantize_4bit(quantized, state), weight)


if __name__ == "__main__":
    main()
