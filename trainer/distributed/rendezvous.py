"""Say where ranks can meet and how long they wait for each other; refuse what never could. Loads no torch."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping

from trainer.errors import LaunchError

RENDEZVOUS_SECONDS = 600
QUIET_SECONDS = 15.0
"""So long a wait is nothing to talk about: processes start at different speeds."""
SAY_AGAIN_SECONDS = 60.0


def is_loopback(host: str) -> bool:
    """Return whether a host's name or address is the machine that says it, without asking a name server."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def network_is_chosen(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether the user has said which network interface the ranks use: ``lo`` lets nodes be one machine."""
    return any(environment.get(f"{backend}_SOCKET_IFNAME") for backend in ("GLOO", "NCCL"))


def slurm_port(environment: Mapping[str, str] = os.environ) -> int:
    """Return the port at which the ranks of a Slurm job meet, as slurm/train.sbatch makes it of the job's number."""
    given, job = environment.get("MASTER_PORT", ""), environment.get("SLURM_JOB_ID", "")
    return int(given) if given.isdigit() else 20000 + (int(job) if job.isdigit() else 0) % 10000


def refuse_copies(environment: Mapping[str, str]) -> None:
    """Refuse a step of Slurm with several tasks that no torchrun has made ranks of: each would train the whole run.

    Raises:
        LaunchError: it is one.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" not in environment and "SLURM_PROCID" in environment and tasks.isdigit() and int(tasks) > 1:
        reason = "starts as many copies of the whole run: they are no ranks"
        hint = "sbatch slurm/train.sbatch, or one task a node: srun --ntasks-per-node=1 … -m trainer.torchrun"
        raise LaunchError("srun", value=f"{tasks} tasks", reason=reason, hint=hint)


def refuse_tasks_a_node(tasks: str) -> None:
    """Refuse more than one task of Slurm on a node: each would be a torchrun of all of the node's processes.

    Args:
        tasks: as Slurm writes it: ``1``, or ``2(x4),1`` on five nodes.

    Raises:
        LaunchError: a node has several.
    """
    counts = {part.partition("(")[0] for part in tasks.split(",")}
    if counts - {"1"}:
        reason = "starts as many torchruns on each node, and one starts all processes of a node"
        hint = "--ntasks-per-node=1; AFINA_NPROC_PER_NODE, or launch.nproc_per_node, says how many processes"
        raise LaunchError("--ntasks-per-node", value=max(counts), reason=reason, hint=hint)
