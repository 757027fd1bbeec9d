"""Check a machine: devices, memory, disks, ports, names."""

from __future__ import annotations

import ipaddress
import os
import shutil
import socket
import stat
import tempfile
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from launch.doctor.finding import FAILED, OK, WARNING, Finding
from launch.environment import cores
from trainer.config import TrainConfig

GIB = 2**30
PROBE_BYTES = 4 * 2**20
"""Written and synced to measure a disk."""
SLOW_BYTES_A_SECOND = 10 * 2**20
MIN_DISK_BYTES, LITTLE_DISK_BYTES = GIB // 16, 2 * GIB
PROCESS_BYTES = 2 * GIB
"""About what a process takes of the host before it has a model: the libraries alone are one GiB."""


def describe_machine(config: TrainConfig, listed_gpus: int, processes: int) -> list[Finding]:
    """Check the devices as training would find them. Loads torch.

    Args:
        config: the job.
        listed_gpus: GPUs that the driver lists for this process.
        processes: of the job, on this node.
    """
    import torch

    gpus = [torch.cuda.get_device_properties(k) for k in range(torch.cuda.device_count())]
    shown = ", ".join(f"{gpu.name} ({gpu.total_memory / GIB:.0f} GiB)" for gpu in gpus)
    if listed_gpus > len(gpus):
        cure = "the torch build of this driver's CUDA (nvidia-smi shows it), from its own index: pytorch.org"
        found = f"torch {torch.__version__} sees {len(gpus)} of the {listed_gpus} GPUs that the driver lists"
        devices = Finding("GPUs", FAILED, found, cure)
    elif gpus and processes > len(gpus):
        found = f"{shown}: {processes} processes would share {len(gpus)}"
        devices = Finding("GPUs", FAILED, found, f"launch.nproc_per_node={len(gpus)}")
    else:
        devices = Finding("GPUs", OK, shown or "none: training runs on the CPU")
    has_bf16 = bool(gpus) and torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = Finding("bf16 on the GPU", OK, "yes" if has_bf16 else "no")
    if gpus and not has_bf16 and config.model.dtype == "bf16":
        bf16 = Finding("bf16 on the GPU", FAILED, f"no, and model.dtype={config.model.dtype}", "model.dtype=auto")
    flash = Finding("flash attention", OK, "yes" if find_spec("flash_attn") else "no: sdpa is used")
    return [devices, bf16, flash]


def check_cores(processes: int) -> Finding:
    """Compare the cores that this process may use with the processes that a job would start here."""
    found = f"{cores()} of {os.cpu_count()}"
    if cores() < processes:
        cure = "launch.cpus_per_node=N under Slurm; fewer processes: launch.nproc_per_node"
        return Finding("CPU cores", WARNING, f"{found} for {processes} processes", cure)
    return Finding("CPU cores", OK, found)


def check_memory(processes: int) -> Finding:
    """Check the free host memory: of the machine, or what a container or job leaves of it."""
    import psutil

    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    limit, left = memory_limit()
    if limit < total:
        total, free = limit, min(free, left)
    found = f"{free / GIB:.1f} of {total / GIB:.0f} GiB free"
    if free < processes * PROCESS_BYTES:
        cure = "a machine or launch.memory with more, or fewer processes: launch.nproc_per_node"
        return Finding("host memory", WARNING, f"{found} for {processes} processes", cure)
    return Finding("host memory", OK, found)


def check_disk(name: str, folder: Path, key: str) -> Finding:
    """Check that a folder can be written, has room, and syncs fast enough; nothing is left in it.

    Args:
        name: of the check.
        folder: it need not be there: the nearest folder above it is taken then.
        key: what to set for another place.
    """
    place = next((each for each in (folder, *folder.parents) if each.exists()), Path("/"))
    elsewhere = f"{key}=FOLDER that you can write, on a disk with room"
    try:
        free = shutil.disk_usage(place).free
        begin = time.monotonic()
        with tempfile.NamedTemporaryFile(dir=place, prefix=".afina-doctor-") as file:
            file.write(os.urandom(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
        speed = PROBE_BYTES / max(time.monotonic() - begin, 1e-6)
    except OSError as error:
        return Finding(name, FAILED, f"{folder}: cannot be written ({error.strerror or error})", elsewhere)
    found = f"{folder}: {free / GIB:.1f} GiB free, {speed / 2**20:.0f} MB/s written and synced"
    if free < MIN_DISK_BYTES:
        return Finding(name, FAILED, found, elsewhere)
    if free < LITTLE_DISK_BYTES:
        return Finding(name, WARNING, found, f"{elsewhere}; checkpoint.keep=1")
    if speed < SLOW_BYTES_A_SECOND:
        return Finding(
            name, WARNING, found, f"{key}=FOLDER of a faster disk, or save less often: checkpoint.every_steps"
        )
    return Finding(name, OK, found)


def check_cache_owner(folder: Path) -> Finding:
    """Check that nobody else can change what is cached: it is read again as it stands."""
    try:
        status = folder.stat()
    except OSError:
        return Finding("cache owner", OK, f"{folder} will be made")
    if status.st_uid not in (0, os.geteuid()):
        return Finding("cache owner", WARNING, f"{folder} is of user {status.st_uid}", "AFINA_CACHE=FOLDER of your own")
    if status.st_mode & stat.S_IWOTH:
        found = f"{folder} can be written by everybody ({stat.filemode(status.st_mode)})"
        return Finding("cache owner", WARNING, found, f"chmod o-w {folder}")
    return Finding("cache owner", OK, f"{folder} ({stat.filemode(status.st_mode)})")


def check_port(port: int, nodes: int, cure: str) -> Finding:
    """Check that rank 0 can listen: on any free port, and on the one where several nodes, or a torchrun by hand, meet.

    Args:
        port: the one that the job would use; 0: any.
        nodes: of the job.
        cure: how to choose another port.
    """
    try:
        with socket.socket() as any_port:
            any_port.bind(("127.0.0.1", 0))
    except OSError as error:
        return Finding("port", FAILED, f"no local port can be bound ({error})", "a container or sandbox with a network")
    try:
        with socket.socket() as chosen:
            chosen.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            chosen.bind(("", port))
    except OSError as error:
        state = FAILED if nodes > 1 else WARNING
        return Finding("port", state, f"{port} cannot be bound here ({error.strerror or error})", cure)
    return Finding("port", OK, f"{port} is free" if port else "local ports can be bound")


def check_name(nodes: int, name: str | None = None) -> Finding:
    """Check what this machine's own name resolves to: a loopback address does not lead other nodes here.

    Args:
        nodes: of the job.
        name: ``None``: this machine's.
    """
    name = socket.gethostname() if name is None else name
    cure = f"ADDRESS {name} in /etc/hosts of every node, or launch.master_address=ADDRESS of the nodes' network"
    addresses = _resolve(name)
    if not addresses:
        state = FAILED if nodes > 1 else WARNING
        return Finding("host name", state, f"{name} does not resolve", cure if nodes > 1 else f"{name} in /etc/hosts")
    found = f"{name} is {', '.join(addresses)}"
    if nodes > 1 and _has_loopback(addresses):
        return Finding("host name", WARNING, f"{found}: on another node that is the node itself", cure)
    return Finding("host name", OK, found)


def check_master(config: TrainConfig) -> Finding:
    """Check the master of several nodes that are started without Slurm.

    On node 0 its own name may be a loopback address; to the others that is no way to it.
    """
    host, addresses = config.launch.master_address, _resolve(config.launch.master_address)
    cure = "launch.master_address=ADDRESS of node 0, as the others reach it"
    if not addresses:
        return Finding("master", FAILED, f"{host} does not resolve", cure)
    found = f"{host} is {', '.join(addresses)}"
    is_chosen = any(os.environ.get(f"{backend}_SOCKET_IFNAME") for backend in ("GLOO", "NCCL"))
    if _has_loopback(addresses) and config.launch.node_rank > 0 and not is_chosen:
        return Finding("master", FAILED, f"{found}: on node {config.launch.node_rank} that is the node itself", cure)
    return Finding("master", OK, found)


def _has_loopback(addresses: list[str]) -> bool:
    return any(ipaddress.ip_address(each.partition("%")[0]).is_loopback for each in addresses)


def _resolve(name: str) -> list[str]:
    try:
        return sorted({str(found[4][0]) for found in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})
    except OSError:
        return []


def memory_limit(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> tuple[int, int]:
    """Return the bytes that a container or a job of Slurm may hold, and how many are left of them (cgroup v2).

    File pages that the kernel can drop count as left. Without a limit both are more than any machine has.
    """
    tightest = (2**62, 2**62)
    with suppress(OSError):
        below = own.read_text(encoding="utf-8").strip().rpartition("::")[2].strip("/")
        for folder in (root / below, *(root / below).parents):
            # "max" is no limit; above the root there is none
            with suppress(OSError, ValueError, StopIteration):
                limit = int((folder / "memory.max").read_text(encoding="utf-8"))
                held = int((folder / "memory.current").read_text(encoding="utf-8"))
                lines = (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
                pages = next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
                tightest = min(tightest, (limit, limit - held + pages))
    return tightest
