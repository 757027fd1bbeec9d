"""Run every check of a machine, or of an allocation, for a job."""

from __future__ import annotations

from pathlib import Path

from launch.doctor import allocation, machine, packages
from launch.doctor.finding import Finding
from launch.environment import visible_gpus
from launch.torchrun import ranks_per_node
from trainer.config import TrainConfig
from trainer.distributed.rendezvous import slurm_port
from trainer.files import cache_root


def check_all(config: TrainConfig) -> list[Finding]:
    """Check whether the job could run here. Takes seconds, most of them loading torch; leaves nothing behind."""
    nodes = allocation.node_count(config)
    is_login_node = config.launch.kind == "slurm" and not allocation.is_inside()
    processes = 1 if is_login_node else ranks_per_node(config)
    port, cure = _port(config)
    cache, runs = cache_root(), Path(config.run.dir).expanduser().absolute()
    findings = [*packages.check_versions(), packages.check_origin()]
    findings += machine.describe_machine(config, visible_gpus(), processes)
    findings += [machine.check_cores(processes), machine.check_memory(processes)]
    findings += [machine.check_disk("disk of runs", runs, "run.dir")]
    findings += [machine.check_disk("disk of the cache", cache, "AFINA_CACHE"), machine.check_cache_owner(cache)]
    findings += [machine.check_port(port, nodes, cure), machine.check_name(nodes)]
    if nodes > 1 and not allocation.is_inside() and not is_login_node:
        findings.append(machine.check_master(config))
    return [*findings, *allocation.check_slurm(config)]


def _port(config: TrainConfig) -> tuple[int, str]:
    """Return the port at which ranks would meet, 0 where it is none of this machine, and how to choose another."""
    if allocation.is_inside():
        return slurm_port(), "export MASTER_PORT=N of a free port"
    if config.launch.kind == "slurm" or config.launch.node_rank > 0:
        return 0, "a container or sandbox with a network"
    if config.launch.nodes > 1:
        return config.launch.master_port, "launch.master_port=N of a free port, the same on every node"
    # `afina train` takes a free one by itself
    return config.launch.master_port, "torchrun by hand: --standalone, or --master-port=N of a free port"
