"""Start and stop the process group; rank and world size; the few collectives that a run needs."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.compat.deepspeed import skip_shm_build
from trainer.compat.torch import run_exit_handlers
from trainer.distributed.meeting import meet
from trainer.distributed.rendezvous import RENDEZVOUS_SECONDS
from trainer.errors import LaunchError

# Read when a process group is made: the last collectives of a rank, for whoever looks why it hangs.
os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
if not torch.cuda.is_available():
    # Read when DeepSpeed is first imported, by whichever library does it; unset, it warns about a missing GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
elif "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    # Read at the first CUDA allocation. No two tries have one shape: segments that grow leave no holes of old ones.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

_BEFORE_SHUTDOWN: list[Callable[[], object]] = []


@dataclass(frozen=True, slots=True)
class World:
    """Rank and world size of this process, and its device.

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
        """Return whether this is rank 0, the one that writes."""
        return self.rank == 0


def from_environment() -> World:
    """Read rank and world size from torchrun's variables; without them this is a world of one. Starts nothing."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return World(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), local_rank, device)


def init(world: World, rendezvous_seconds: float = RENDEZVOUS_SECONDS) -> None:
    """Start the process group (NCCL on GPU, gloo on CPU) and hand it to DeepSpeed.

    Its collectives wait for a day: how long a rank may keep the others waiting depends on what it does, and heartbeats
    tell (``trainer.distributed.heartbeat``).

    Args:
        world: this process.
        rendezvous_seconds: how long the ranks wait for each other here.

    Raises:
        LaunchError: DeepSpeed is not a version that this program was tried with; or the ranks cannot meet.
    """
    import deepspeed

    if world.world_size > 1 and os.environ.get("MASTER_PORT") == "0":
        # torchrun hands a static port 0 on as it is, and every rank would wait for ever
        raise LaunchError("--master-port", value=0, reason="is no port that ranks can meet at", hint="--standalone")
    skip_shm_build(on_cpu=world.device.type == "cpu")
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    timeout = timedelta(days=1)
    if world.world_size == 1 and "RANK" not in os.environ:
        # A world of one needs no port. DeepSpeed reads these variables even then.
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    elif world.world_size > 1:
        store = meet(world.rank, world.world_size, backend, rendezvous_seconds)
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.world_size, timeout=timeout)
    deepspeed.init_distributed(backend, timeout=timeout, verbose=False)


def before_shutdown(work: Callable[[], object]) -> None:
    """Let something be done when the process group ends, while it is still there."""
    _BEFORE_SHUTDOWN.append(work)


def shutdown() -> None:
    """End the process group, if there is one; another can be started then."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    while _BEFORE_SHUTDOWN:
        with contextlib.suppress(Exception):  # of a run that has failed
            _BEFORE_SHUTDOWN.pop()()
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None and deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()  # its own groups with it: it would take them for the next one's
    else:
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


def sum_over_ranks(values: Sequence[float] | Tensor, device: torch.device) -> list[float]:
    """Sum numbers over all ranks, element by element, in float64: one small all-reduce and one copy to the host.

    Args:
        values: as many on every rank; a tensor is left as it is, and not waited for.
        device: of the process group.
    """
    if isinstance(values, Tensor):
        total = values.to(device, torch.float64, copy=True)
    else:
        total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def is_lost_connection(error: BaseException) -> bool:
    """Return whether a collective has failed because another rank is gone: gloo has no class of its own for that."""
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in ("gloo", "Connection closed by peer"))


def gather_objects(value: Any) -> list[Any]:
    """Gather every rank's value on every rank, in the order of ranks. A collective; values are pickled."""
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out


def from_main(value: Any) -> Any:
    """Broadcast rank 0's value to every rank. A collective; the value is pickled."""
    return from_rank(value, 0)


def from_rank(value: Any, rank: int) -> Any:
    """Broadcast one rank's value to every rank. A collective; the value is pickled."""
    box = [value]
    dist.broadcast_object_list(box, src=rank)
    return box[0]


def barrier() -> None:
    """Wait for every rank."""
    # NCCL guesses the device where it is not told, and warns that it does.
    dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)
