"""Check the ``launch`` group: what no job could be started with is refused before one waits in a queue."""

from __future__ import annotations

import re
from pathlib import Path

from trainer.config.messages import as_typed, config_error
from trainer.config.schema import LaunchConfig, TrainConfig
from trainer.distributed.rendezvous import is_loopback, network_is_chosen

SLURM_KEYS = (
    *("gpus_per_node", "cpus_per_node", "memory", "time", "partition", "account", "qos", "constraint", "script"),
    *("sbatch_args", "srun_args", "setup", "warn_seconds", "array_parallel"),
)
BY_HAND_KEYS = ("node_rank", "master_address", "master_port")
# What sbatch takes: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].
_TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}|UNLIMITED|infinite", re.IGNORECASE)
_MEMORY = re.compile(r"\d+[KMGT]?", re.IGNORECASE)


def check_launch(config: TrainConfig) -> None:
    """Raise a :class:`ConfigError` for the first rule that the group breaks."""
    launch = config.launch
    if launch.kind == "here":
        for name, value in (("nodes", launch.nodes), ("nproc_per_node", launch.nproc_per_node)):
            if value is not None and value > 1:
                reason = "launch=here is one process"
                raise config_error(f"launch.{name}", value, reason, f"launch=torchrun launch.{name}={value}")
    if launch.kind == "slurm":
        _slurm(launch)
    else:
        _torchrun(launch)


def _torchrun(launch: LaunchConfig) -> None:
    defaults = LaunchConfig()
    for name in SLURM_KEYS:
        if (value := getattr(launch, name)) != getattr(defaults, name):
            reason = f"says what Slurm is asked for, and launch={launch.kind} asks it for nothing"
            raise config_error(f"launch.{name}", value, reason, "launch=slurm")
    if launch.node_rank >= launch.nodes:
        reason = f"nodes are numbered from 0, and launch.nodes is {launch.nodes}"
        raise config_error("launch.node_rank", launch.node_rank, reason, f"launch.node_rank={launch.nodes - 1}")
    if launch.nodes > 1 and launch.master_port == 0:
        reason = f"a free port cannot be agreed on by {launch.nodes} nodes"
        raise config_error("launch.master_port", 0, reason, "launch.master_port=29500")
    if launch.nodes > 1 and is_loopback(launch.master_address) and not network_is_chosen():
        reason = f"is each node itself: {launch.nodes} nodes would wait for each other"
        hint = "launch.master_address=HOST of node 0, as the others reach it"
        raise config_error("launch.master_address", launch.master_address, reason, hint)


def _slurm(launch: LaunchConfig) -> None:
    defaults = LaunchConfig()
    for name in BY_HAND_KEYS:
        if (value := getattr(launch, name)) != getattr(defaults, name):
            reason = "is of nodes that are started by hand, and a job of Slurm knows its own"
            raise config_error(f"launch.{name}", value, reason, "export MASTER_ADDR and MASTER_PORT, if at all")
    for name, value, pattern, example in (
        ("time", launch.time, _TIME, "04:00:00 or 2-00:00:00"),
        ("memory", launch.memory, _MEMORY, "120G, or 0 for all of a node's"),
    ):
        if value is not None and not pattern.fullmatch(value):
            raise config_error(f"launch.{name}", value, "sbatch does not read it", f"for example {example}")
    for name in ("setup", "sbatch_args", "srun_args"):
        for line in getattr(launch, name):
            if "\n" in line or not line.strip():
                raise config_error(
                    f"launch.{name}", line, "each is one line", as_typed(f"launch.{name}", ["one", "two"])
                )
    for name in ("partition", "account", "qos", "constraint"):
        value = getattr(launch, name)
        if value is not None and (not value.strip() or any(c.isspace() for c in value)):
            raise config_error(f"launch.{name}", value, "is one word", f"launch.{name}=WORD, or null")
    for option in launch.sbatch_args:
        if not option.startswith("--"):
            raise config_error(
                "launch.sbatch_args", option, "must begin with --", as_typed("launch.sbatch_args", ["--nice=100"])
            )
    if launch.script is not None and not Path(launch.script).expanduser().is_file():
        hint = "`afina slurm-script > my.sbatch`, and launch.script=my.sbatch"
        raise config_error("launch.script", launch.script, "there is no such file", hint)
