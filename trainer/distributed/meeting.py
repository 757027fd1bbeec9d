"""Bring the ranks of a job together: choose the network, say who is missing."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping
from datetime import timedelta

import psutil
import torch.distributed as dist

from trainer.distributed.rendezvous import QUIET_SECONDS, SAY_AGAIN_SECONDS, is_loopback, network_is_chosen
from trainer.errors import LaunchError

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2
# Any address outside: nothing is sent to it, the kernel only says by which way it would go.
_OUTSIDE = ("192.0.2.1", 9)


def choose_network(environment: Mapping[str, str], backend: str) -> dict[str, str]:
    """Return the variables that let ranks of several nodes reach each other; what the user has set is kept.

    Gloo asks for the address of the machine's own name, which on many is 127.0.0.1: it then waits for ever.

    Args:
        environment: of a rank; ``LOCAL_WORLD_SIZE`` is torchrun's.
        backend: ``gloo`` or ``nccl``; NCCL looks for its network itself.

    Raises:
        LaunchError: the master is each node itself; or no network leads to it.
    """
    nodes_are_one = environment.get("WORLD_SIZE") == environment.get("LOCAL_WORLD_SIZE")
    if nodes_are_one or network_is_chosen(environment):
        return {}
    master = environment.get("MASTER_ADDR", "127.0.0.1")
    if is_loopback(master):
        reason = "is each node itself, and the ranks are on several: they would wait for each other"
        hint = f"--master-addr HOST of node 0; or {backend.upper()}_SOCKET_IFNAME=lo where all is one machine"
        raise LaunchError("--master-addr", value=master, reason=reason, hint=hint)
    if backend != "gloo":
        return {}
    return {"GLOO_SOCKET_IFNAME": find_interface(master)}


def find_interface(master: str) -> str:
    """Return the network interface by which this machine reaches the master, or, on the master, the others reach it.

    Raises:
        LaunchError: the name is not known here, or there is no way to it.
    """
    try:
        address = socket.getaddrinfo(master, None, type=socket.SOCK_DGRAM)[0][4][0]
    except OSError as error:
        hint = "an address in its place, or its name in /etc/hosts of every node"
        raise LaunchError("--master-addr", value=master, reason=f"is not known here ({error})", hint=hint) from error
    own = _own_address((str(address), 9))
    if own is None or is_loopback(own):  # the master's own name is often 127.0.1.1 on the master
        own = _own_address(_OUTSIDE)
    for name, addresses in psutil.net_if_addrs().items():
        if own in [each.address for each in addresses] and name != "lo":
            return name
    reason = "cannot be reached: this machine has no network but itself"
    hint = "GLOO_SOCKET_IFNAME=NAME of a network that all nodes share (ip -brief address)"
    raise LaunchError("--master-addr", value=master, reason=reason, hint=hint)


def meet(rank: int, world_size: int, backend: str, seconds: float) -> dist.Store:
    """Choose the network, wait for every rank, and say who is missing; return the store that they have met at.

    Args:
        rank: of this process.
        world_size: number of ranks.
        backend: ``gloo`` or ``nccl``.
        seconds: to wait.

    Raises:
        LaunchError: the master cannot be reached, or not all ranks have come in time; it names them.
    """
    os.environ.update(choose_network(os.environ, backend))
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store = _open_store(rank, world_size, timedelta(seconds=seconds))
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        reason = f"rank {rank} on {socket.gethostname()} could not reach it within {seconds:.0f} s"
        hint = "a firewall? --master-addr as an address of the network that the nodes share"
        raise LaunchError(where, reason=reason, hint=hint) from error
    life = f"afina/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    store.set(f"{life}/here/{rank}", "")
    store.add(f"{life}/count", 1)  # behind the key: who is missing is asked for only where somebody is
    begin = said = time.monotonic()
    while store.add(f"{life}/count", 0) < world_size:
        passed = time.monotonic() - begin
        if passed > seconds:
            reason = f"{_missing(store, life, world_size)} did not come within {seconds:.0f} s"
            hint = "did its node start, with the same --master-addr and --nnodes? (launch.rendezvous_seconds)"
            raise LaunchError(where, reason=reason, hint=hint)
        if begin + passed - said > (QUIET_SECONDS if said == begin else SAY_AGAIN_SECONDS):
            said = begin + passed
            logger.info(f"waiting for {_missing(store, life, world_size)} at {where}, {seconds - passed:.0f} s more")
        time.sleep(POLL_SECONDS)
    return dist.PrefixStore(life, store)


def _open_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Return the store at the master: torchrun's own, or, where no torchrun has started the ranks, one of rank 0.

    That one must not wait for the others itself: it could not say who is missing.
    """
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and host and port.isdigit():
        return dist.TCPStore(host, int(port), world_size, rank == 0, timeout, wait_for_workers=False)
    store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
    return store


def _missing(store: dist.Store, life: str, world_size: int) -> str:
    """Say which ranks have not come."""
    missing = [rank for rank in range(world_size) if not store.check([f"{life}/here/{rank}"])]
    shown = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
    return f"{'rank' if len(missing) == 1 else 'ranks'} {shown} of {world_size}"


def _own_address(there: tuple[str, int]) -> str | None:
    """Return the address of this machine that talks to another one."""
    family = socket.AF_INET6 if ":" in there[0] else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(there)
            return str(probe.getsockname()[0])
    except OSError:
        return None
