"""Let ranks meet and measure them: on this node, or the line that does it on all nodes of an allocation."""

from __future__ import annotations

import shlex
import subprocess
import sys

from launch.doctor.allocation import node_count
from launch.environment import child_environment, visible_gpus
from trainer.config import TrainConfig
from trainer.errors import LaunchError

START_SECONDS = 120
"""What loading libraries and ending processes may take beside the two waits that the preflight itself bounds."""


def measure_ranks(config: TrainConfig, ranks: int) -> int:
    """Run the preflight with so many processes on this node; what they have found goes to stdout.

    Inside an allocation of several nodes nothing is started: the line for all of them is printed.

    Returns:
        0, or the exit code of a failure that the processes have told.

    Raises:
        LaunchError: they do not end.
    """
    nodes, seconds = node_count(config), config.launch.rendezvous_seconds
    if nodes > 1:
        print(f"The job has {nodes} nodes. From its first one:\n\n{srun_line(ranks, seconds)}")
        return 0
    words = [sys.executable, "-P", "-m", "trainer.torchrun", "--standalone", "--local-addr=127.0.0.1"]
    words += [f"--nproc-per-node={ranks}", "-m", "trainer.preflight", f"--seconds={seconds}"]
    try:
        environment = child_environment(ranks, visible_gpus())
        done = subprocess.run(words, env=environment, timeout=2 * seconds + START_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise LaunchError("preflight", reason=f"has not ended in {error.timeout:.0f} s", hint="ps; dmesg") from None
    return done.returncode


def srun_line(ranks: int, seconds: int) -> str:
    """Return the command that measures so many ranks on each node of this allocation, one torchrun a node."""
    words = [shlex.quote(sys.executable), "-P", "-m", "trainer.torchrun", "--nnodes=$SLURM_JOB_NUM_NODES"]
    words += [f"--nproc-per-node={ranks}", "--node-rank=$SLURM_NODEID", "--rdzv-backend=static"]
    words += [f"--rdzv-conf=timeout={seconds}", "--master-port=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"]
    words += ["--master-addr=${MASTER_ADDR:-$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)}"]
    words += ["-m", "trainer.preflight", f"--seconds={seconds}"]
    return f"srun --ntasks-per-node=1 bash -c {shlex.quote(' '.join(words))}"
