"""The process group: who am I, start, stop, and the few reductions that the loop needs."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from trainer.compat.deepspeed import skip_shm_build
from trainer.compat.torch import run_exit_handlers

if not torch.cuda.is_available():
    # Read when DeepSpeed is first imported, by whichever library does it; unset, it warns about a missing GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


@dataclass(frozen=True, slots=True)
class World:
    """This process among the others.

    Attributes:
        rank: number of this process, from 0, over all nodes.
        world_size: number of processes.
        local_rank: number of this process on its node.
        device: where its tensors live.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that writes."""
        return self.rank == 0


def from_environment() -> World:
    """Read torchrun's variables; without them this is a world of one. Starts nothing."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return World(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), local_rank, device)


def init(world: World, timeout_seconds: int = 1800) -> None:
    """Start the process group (NCCL on GPU, gloo on CPU) and hand it to DeepSpeed."""
    import deepspeed

    skip_shm_build(on_cpu=world.device.type == "cpu")
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    if world.world_size == 1 and "RANK" not in os.environ:
        # A world of one needs no port. DeepSpeed reads these variables even then.
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    deepspeed.init_distributed(backend, timeout=timeout, verbose=False)


def shutdown() -> None:
    """End the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def leave(exit_code: int) -> NoReturn:
    """End this process with that code: exit handlers run and output is flushed, but Python is not taken down.

    Gloo's threads outlive ``destroy_process_group`` (DeepSpeed's modules keep the groups), and one that lets go of a
    tensor while the interpreter goes away aborts a process whose work is done (see ``run_exit_handlers``): torchrun
    then calls the run failed.
    """
    run_exit_handlers()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # its reader has left, or it is closed
            stream.flush()
    os._exit(exit_code)


def sum_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Element-wise sum over all ranks, in float64: one small all-reduce."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in the order of ranks, on every rank."""
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out


def from_main(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait for every rank."""
    dist.barrier()
