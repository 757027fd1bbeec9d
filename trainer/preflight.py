"""Let the ranks of a job meet, sum buffers and measure each other, before a run is paid for: ``python -m
trainer.preflight`` under torchrun, under srun with a task a rank, or alone.

Rank 0 prints a line for each rank: its host and device, the time of work of its own, and the bandwidth of all-reduces.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from trainer.distributed import process_group
from trainer.distributed.meeting import meet
from trainer.distributed.process_group import World
from trainer.distributed.rendezvous import RENDEZVOUS_SECONDS, slurm_port
from trainer.errors import AfinaError, LaunchError
from trainer.tracking.logs import configure_logging

MEGABYTES = (1, 16, 64)
REPEATS = 5
SLOW = 1.5
"""A rank whose own work takes so many times the median is told to be slow."""
LOOK_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Measured:
    """What one rank has measured.

    Attributes:
        rank: its number.
        host: its machine's name.
        device: its device, as people call it.
        work_seconds: the median time of a matrix product that needs no other rank.
        bandwidths: by buffer size in MB, the bus bandwidth of an all-reduce in bytes a second; empty for one rank.
    """

    rank: int
    host: str
    device: str
    work_seconds: float
    bandwidths: dict[int, float] = field(default_factory=dict)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the command line says; returns 0, or 4 when the ranks could not meet or sum."""
    parser = argparse.ArgumentParser(prog="python -m trainer.preflight", description="let ranks meet and measure them")
    parser.add_argument(
        "--seconds", type=float, default=RENDEZVOUS_SECONDS, help="to wait for the others, and then to measure"
    )
    seconds = parser.parse_args(arguments).seconds
    rank = os.environ.get("RANK", "0")
    try:
        os.environ.update(srun_ranks(os.environ))
        world = process_group.from_environment()
        rank = str(world.rank)
        configure_logging(rank=world.rank)
        lines = run(world, seconds)
    except AfinaError as error:
        if rank != "0":  # it speaks for all: whoever started the others ends them meanwhile
            time.sleep(LOOK_SECONDS)
        print(f"[rank {rank}] error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    if world.is_main:
        print("\n".join(lines), flush=True)
    return 0


def srun_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """Return torchrun's variables for a task of ``srun`` that no torchrun has started; empty where it has.

    Raises:
        LaunchError: Slurm does not say which host is the first.
    """
    if "RANK" in environment or "SLURM_PROCID" not in environment:
        return {}
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks == "1":
        return {}
    here = environment.get("SLURM_STEP_TASKS_PER_NODE", tasks).partition("(")[0].partition(",")[0]
    ranks = {"RANK": environment["SLURM_PROCID"], "WORLD_SIZE": tasks}
    ranks |= {"LOCAL_RANK": environment.get("SLURM_LOCALID", "0"), "LOCAL_WORLD_SIZE": here}
    ranks["MASTER_PORT"] = str(slurm_port(environment))
    ranks["MASTER_ADDR"] = environment.get("MASTER_ADDR") or _first_host(environment, one_node=here == tasks)
    return ranks


def _first_host(environment: Mapping[str, str], one_node: bool) -> str:
    if one_node:
        return "127.0.0.1"
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    try:
        command = ["scontrol", "show", "hostnames", nodes]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        reason = f"scontrol does not say which host is the first ({error})"
        raise LaunchError("SLURM_STEP_NODELIST", value=nodes, reason=reason, hint="export MASTER_ADDR=HOST") from error


def run(world: World, seconds: float) -> list[str]:
    """Meet, measure, and return the lines of the report; on ranks other than 0 too.

    Args:
        world: of this process.
        seconds: to wait for the other ranks, and then for all that is measured.

    Raises:
        LaunchError: the ranks cannot meet, do not answer in time, or do not sum right.
    """
    if world.device.type == "cuda":
        count = torch.cuda.device_count()  # one, where srun has given each task its own
        device = torch.device("cuda", world.local_rank % count)
        world = World(world.rank, world.world_size, world.local_rank, device)
        torch.cuda.set_device(device)
    if world.world_size == 1:
        return report([Measured(0, socket.gethostname(), _device_name(world), time_work(world.device))])
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    store = meet(world.rank, world.world_size, backend, seconds)
    with deadline(seconds, world, store) as enter:
        try:
            # a collective's own end comes after the deadline's, which can say who is missing
            late = timedelta(seconds=seconds + 4 * LOOK_SECONDS)
            dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.world_size, timeout=late)
            enter("work of its own")
            process_group.barrier()
            work = time_work(world.device)
            bandwidths = {}
            for megabytes in MEGABYTES:
                enter(f"all-reduce of {megabytes} MB")
                bandwidths[megabytes] = time_all_reduce(world, megabytes)
            enter("report")
            mine = Measured(world.rank, socket.gethostname(), _device_name(world), work, bandwidths)
            return report(process_group.gather_objects(mine))
        except RuntimeError as error:
            raise _explained(error) from error


@contextmanager
def deadline(seconds: float, world: World, store: dist.Store) -> Iterator[Callable[[str], None]]:
    """End this process with one line and exit code 4 unless the block ends in time: a collective cannot be left else.

    Yields:
        What to call with the name of each stage that begins. The line names the ranks that have not come so far.
    """
    stage, reached = ["start"], [0]

    def enter(name: str) -> None:
        stage[0], reached[0] = name, reached[0] + 1
        store.set(f"stage/{reached[0]}/{world.rank}", name)

    def end() -> None:
        behind = _look(lambda: [r for r in range(world.world_size) if not store.check([f"stage/{reached[0]}/{r}"])])
        who = f"rank {', '.join(map(str, behind))} did not come" if behind else "no rank is missing"
        reason = f"has not ended within {seconds:.0f} s ({who})"
        hint = "is that process stopped, its network blocked? NCCL_DEBUG=INFO (launch.rendezvous_seconds)"
        print(
            f"[rank {world.rank}] error: {LaunchError(stage[0], reason=reason, hint=hint)}", file=sys.stderr, flush=True
        )
        os._exit(LaunchError.exit_code)

    # rank 0 speaks for all; the others only where it is rank 0 that hangs
    timer = threading.Timer(seconds if world.is_main else seconds + 2 * LOOK_SECONDS, end)
    timer.daemon = True
    timer.start()
    try:
        yield enter
    finally:
        timer.cancel()


def _look(question: Callable[[], list[int]]) -> list[int]:
    """Answer a question to the store, or give up: the process that holds it may be the one that hangs."""
    answer: list[int] = []
    asker = threading.Thread(target=lambda: answer.extend(question()), daemon=True)
    asker.start()
    asker.join(LOOK_SECONDS)
    return answer


def time_work(device: torch.device) -> float:
    """Return the median seconds of a matrix product on this device: no other rank and no network is in it."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    left = torch.ones(size, size, device=device, dtype=dtype)
    return _median_seconds(lambda: left @ left, device)


def time_all_reduce(world: World, megabytes: int) -> float:
    """Return the bus bandwidth of an all-reduce of fp32 in bytes a second.

    It is what nccl-tests call so: bytes / seconds × 2 (n - 1) / n, what each link carries in a ring, whatever n.

    Raises:
        LaunchError: the sum is wrong.
    """
    buffer = torch.full((megabytes * 2**20 // 4,), float(world.rank + 1), device=world.device)
    dist.all_reduce(buffer)
    expected = world.world_size * (world.world_size + 1) / 2
    if not bool((buffer == expected).all()):
        reason = f"rank {world.rank} on {socket.gethostname()} has got a wrong sum"
        raise LaunchError(f"all-reduce of {megabytes} MB", reason=reason, hint="leave that machine out")
    buffer.zero_()
    process_group.barrier()
    seconds = _median_seconds(lambda: dist.all_reduce(buffer), world.device)
    return megabytes * 2**20 / seconds * 2 * (world.world_size - 1) / world.world_size


def _median_seconds(act: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])  # the first one opens connections and fills caches


def report(measured: Sequence[Measured]) -> list[str]:
    """Return the lines of the report: a rank each, and which one was slowest at its own work."""
    sizes = list(measured[0].bandwidths)
    rows = [["rank", "host", "device", "own work ms", *(f"all-reduce {size} MB GB/s" for size in sizes)]]
    for each in measured:
        speeds = [f"{each.bandwidths[size] / 1e9:.3f}" for size in sizes]
        rows.append([str(each.rank), each.host, each.device, f"{each.work_seconds * 1e3:.2f}", *speeds])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if len(measured) > 1:
        lines.append(_slowest(measured))
    return lines


def _slowest(measured: Sequence[Measured]) -> str:
    last = max(measured, key=lambda each: each.work_seconds)
    times = last.work_seconds / statistics.median_low(each.work_seconds for each in measured)
    text = f"slowest at its own work: rank {last.rank} on {last.host}, {times:.2f} × the median"
    return f"{text}: every step waits for it → what else runs there? (nvidia-smi, top)" if times > SLOW else text


def _device_name(world: World) -> str:
    if world.device.type == "cuda":
        return f"{torch.cuda.get_device_name(world.device)} ({world.device})"
    return f"CPU, {torch.get_num_threads()} threads"


def _explained(error: RuntimeError) -> LaunchError:
    text = " ".join(str(error).split())[:300]
    hint = "its rank's own line says why; else the network between them: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"
    return LaunchError("preflight", reason=f"a rank is gone, or cannot be reached ({text})", hint=hint)


if __name__ == "__main__":
    process_group.leave(main())
