"""Set environment variables for the processes of a job, each for its reason.

Only what is unset is set: whoever exports a variable knows their cluster better than we do.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

# How long torchrun lets a worker finish after SIGTERM before it kills it. Its own 30 s is less than it takes to write a
# large checkpoint; much more would keep the GPUs of a job whose rank died waiting for ranks stuck in a collective.
SHUTDOWN_SECONDS = 120
# Trials that shared these would be one W&B run, or have one name.
ONE_RUNS_OWN = ("WANDB_RUN_ID", "WANDB_NAME")


def visible_gpus(environment: Mapping[str, str] | None = None) -> int:
    """Count the NVIDIA GPUs that the processes of this machine may use; found without importing torch (8 s).

    `CUDA_VISIBLE_DEVICES` decides when it is set (as in CUDA, an entry of -1 hides itself and all after it); else
    `nvidia-smi` is asked. 0 when there are none.
    """
    environment = os.environ if environment is None else environment
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        devices = [device.strip() for device in visible.split(",")]
        return next((i for i, device in enumerate(devices) if device in ("", "-1")), len(devices))
    if shutil.which("nvidia-smi") is None:
        return 0
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    # slices of a GPU (MIG) are listed indented below it, so only lines that begin with "GPU" are devices
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def gpu_names(environment: Mapping[str, str] | None = None) -> list[str]:
    """Return what `CUDA_VISIBLE_DEVICES` calls each GPU that this machine's processes may use, in their order."""
    environment = os.environ if environment is None else environment
    count = visible_gpus(environment)
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(number) for number in range(count)]
    return [device.strip() for device in visible.split(",")][:count]


def cores() -> int:
    """Count the cores this process may run on: what Slurm, taskset or a container left us, not what the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def defaults(ranks: int, gpus: int, master_address: str) -> dict[str, str]:
    """Return the variables a rank should find unless the user set them.

    Args:
        ranks: processes on this node.
        gpus: GPUs on this node, 0 on a CPU machine.
        master_address: host of rank 0, as the ranks reach it.
    """
    variables = {
        # torchrun sets 1 thread a rank when this is unset: on CPU that leaves most cores idle; and no limit at all
        # makes every rank start a thread a core, which is slower still
        "OMP_NUM_THREADS": str(max(1, cores() // ranks)),
        # where each thread stood, when native code crashes
        "PYTHONFAULTHANDLER": "1",
        # a tokenizer used before a fork otherwise warns on every later fork, or can lock up
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS),
    }
    if gpus:
        # a failed or timed-out collective ends the process; otherwise the other ranks wait, and are paid for, for ever
        variables["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "1"
        # without it a failing NCCL says only "unhandled system error"
        variables["NCCL_DEBUG"] = "WARN"
    elif master_address in ("127.0.0.1", "localhost") and Path("/sys/class/net/lo").exists():
        # gloo looks up the machine's own host name to choose an interface, which in many containers resolves to nothing
        variables["GLOO_SOCKET_IFNAME"] = "lo"
    return variables


def child_environment(ranks: int, gpus: int, master_address: str = "127.0.0.1") -> dict[str, str]:
    """Return this process's environment, completed with :func:`defaults`; nothing the user set is changed."""
    return {**defaults(ranks, gpus, master_address), **os.environ}


@contextmanager
def without_names_of_one_run() -> Iterator[None]:
    """Take out of this process's environment, inside the ``with`` block, what only one run can have."""
    taken = {name: os.environ.pop(name) for name in ONE_RUNS_OWN if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)
