"""Start a job with torchrun's agent: one process a device, on this node."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import trainer.config
from launch import process
from launch.environment import child_environment, visible_gpus
from trainer.config import TrainConfig
from trainer.config.messages import quote


def ranks_per_node(config: TrainConfig) -> int:
    """Return the processes a node: `launch.nproc_per_node`, or one a GPU, or one."""
    return config.launch.nproc_per_node or visible_gpus() or 1


def train_arguments(config: TrainConfig, overrides: Sequence[str], config_file: Path | None = None) -> list[str]:
    """Return arguments of `trainer.train` that repeat this config in another process, the run's name fixed.

    The name is decided once, here: ranks that each made up their own could come to write into different folders.
    """
    arguments = ["--config", str(config_file)] if config_file else []
    arguments += overrides
    if config.run.name is None:
        arguments.append(f"run.name={quote(trainer.config.run_name(config))}")
    return arguments


def command(config: TrainConfig, overrides: Sequence[str], config_file: Path | None = None) -> list[str]:
    """Build the whole command line: torchrun's agent for this node and what each of its workers runs."""
    return [*_agent(config), *train_arguments(config, overrides, config_file)]


def _agent(config: TrainConfig) -> list[str]:
    settings = config.launch
    head = [sys.executable, "-m", "trainer.torchrun"]
    head += [
        f"--nproc-per-node={ranks_per_node(config)}",
        f"--nnodes={settings.nodes}",
    ]
    if settings.nodes == 1:
        # --standalone takes a free port, so two jobs on a machine never collide; without a local address the workers
        # are sent to the machine's host name, which in a container may resolve to nothing
        head += ["--standalone", "--local-addr=127.0.0.1"]
    else:
        # static: node_rank decides which node is which, so rank 0 (and its run folder) is on the node that was named
        head += ["--rdzv-backend=static", f"--node-rank={settings.node_rank}"]
        head += [f"--rdzv-conf=timeout={settings.rendezvous_seconds}"]
        head += [f"--master-addr={settings.master_address}", f"--master-port={settings.master_port}"]
    return [*head, "-m", "trainer.train"]


def launch(
    config: TrainConfig,
    overrides: Sequence[str],
    config_file: Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> int:
    """Run the job on this node to its end; returns an exit code as :func:`launch.process.run` does.

    Args:
        config: the composed config of ``overrides`` and ``config_file``, already checked.
        overrides: Hydra overrides, passed on to every process.
        config_file: a config.yaml to start from instead of `conf/`.
        variables: of the processes' environment, beside this one's.

    Raises:
        LaunchError: the processes died without a summary.
    """
    arguments = train_arguments(config, overrides, config_file)
    return run(config, arguments, trainer.config.run_folder(config), variables)


def run(config: TrainConfig, arguments: Sequence[str], folder: Path, variables: Mapping[str, str] | None = None) -> int:
    """Run `trainer.train` on this node to its end; returns and raises as :func:`launch`.

    Args:
        config: how it is started, with ``launch``.
        arguments: of `trainer.train`.
        folder: of the run, whose summary says how it ended; or of a group of runs, which has none.
        variables: of the processes' environment, beside this one's.
    """
    environment = child_environment(ranks_per_node(config), visible_gpus(), config.launch.master_address)
    environment |= variables or {}
    return process.run([*_agent(config), *arguments], environment, folder)
