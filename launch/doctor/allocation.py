"""Compare an allocation of Slurm with what the job asks for: nodes, tasks a node, GPUs, cores."""

from __future__ import annotations

import os
from collections.abc import Mapping

from launch.doctor.finding import FAILED, OK, WARNING, Finding
from launch.environment import cores
from launch.slurm.queue import has_slurm
from trainer.config import TrainConfig


def is_inside(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process runs inside an allocation of Slurm."""
    return "SLURM_JOB_ID" in environment


def node_count(config: TrainConfig, environment: Mapping[str, str] = os.environ) -> int:
    """Return the nodes that a job started here has: the allocation's, or those that ``launch.nodes`` asks for."""
    if is_inside(environment):
        return _number(environment, "SLURM_JOB_NUM_NODES") or _number(environment, "SLURM_NNODES") or 1
    return config.launch.nodes


def check_slurm(config: TrainConfig, environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """Check that jobs can be submitted, where that is asked for; and, inside an allocation, what it holds."""
    if is_inside(environment):
        job = Finding("Slurm", OK, f"inside job {environment['SLURM_JOB_ID']}")
        return [job, *_check_allocation(config, environment)]
    if has_slurm():
        return [Finding("Slurm", OK, "sbatch is on PATH; this is no allocation")]
    if config.launch.kind == "slurm":
        return [Finding("Slurm", FAILED, "sbatch is not on PATH", "a login node of the cluster, or launch=torchrun")]
    return [Finding("Slurm", OK, "not here: sbatch is not on PATH")]


def _check_allocation(config: TrainConfig, environment: Mapping[str, str]) -> list[Finding]:
    return [_check_nodes(config, environment), _check_tasks(environment), *_check_devices(config, environment)]


def _check_nodes(config: TrainConfig, environment: Mapping[str, str]) -> Finding:
    has, asked = node_count(config, environment), config.launch.nodes
    found = f"{has} ({environment.get('SLURM_JOB_NODELIST', 'unnamed')})"
    if asked > has:
        return Finding("nodes of the job", FAILED, f"{found}, launch.nodes asks {asked}", f"--nodes={asked}")
    if 1 < asked < has:  # 1 is the default: nothing was asked, and the batch script takes all
        return Finding("nodes of the job", WARNING, f"{found}, launch.nodes asks {asked}", f"launch.nodes={has}")
    return Finding("nodes of the job", OK, found)


def _check_tasks(environment: Mapping[str, str]) -> Finding:
    """Check that there is one torchrun a node: it starts the node's processes itself."""
    asked = environment.get("SLURM_NTASKS_PER_NODE")
    given = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or "1"
    cure = "--ntasks-per-node=1: the one task of a node starts a process for each GPU"
    if asked not in (None, "1"):
        return Finding("tasks a node", FAILED, f"{asked} asked: as many torchruns on each node", cure)
    if {part.partition("(")[0] for part in given.split(",")} != {"1"}:  # "2(x4),1" on five nodes
        return Finding("tasks a node", WARNING, given, f"srun {cure}")
    return Finding("tasks a node", OK, given)


def _check_devices(config: TrainConfig, environment: Mapping[str, str]) -> list[Finding]:
    has, asked = _gpus(environment), config.launch.gpus_per_node
    found = f"{has} on this node"
    if asked is not None and asked > has:
        finding = Finding(
            "GPUs of the job", FAILED, f"{found}, launch.gpus_per_node asks {asked}", f"--gpus-per-node={asked}"
        )
    else:
        finding = Finding("GPUs of the job", OK, found)
    wanted, usable = config.launch.cpus_per_node, cores()
    if wanted is not None and wanted > usable:
        text = f"{usable} on this node, launch.cpus_per_node asks {wanted}"
        return [finding, Finding("cores of the job", WARNING, text, f"--cpus-per-task={wanted}")]
    return [finding, Finding("cores of the job", OK, f"{usable} on this node")]


def _gpus(environment: Mapping[str, str]) -> int:
    """Count the node's GPUs as the batch script does."""
    if (count := _number(environment, "SLURM_GPUS_ON_NODE")) is not None:
        return count
    listed = environment.get("SLURM_STEP_GPUS") or environment.get("SLURM_JOB_GPUS") or ""
    return len([device for device in listed.split(",") if device])


def _number(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name, "")
    return int(value) if value.isdigit() else None
