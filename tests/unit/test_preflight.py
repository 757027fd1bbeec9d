"""``trainer.preflight``: ranks meet, sum and are measured; what does not answer is named within its time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.environment import visible_gpus
from tests.helpers.processes import ROOT, run
from trainer.errors import LaunchError
from trainer.preflight import Measured, report, srun_ranks

STEP = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "10012"}
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
# Meets the others and begins, then never comes to the first collective.
HANGS = """
import time
from datetime import timedelta
import torch.distributed as dist
from trainer.distributed.meeting import meet
store = meet(1, 2, "gloo", 60)
dist.init_process_group("gloo", store=store, rank=1, world_size=2, timeout=timedelta(seconds=60))
time.sleep(300)
"""


def test_the_slowest_rank_is_named() -> None:
    speeds = {1: 1e9, 16: 2e9}
    ranks = [Measured(r, f"node{r // 2}", "CPU", 0.010 * (3 if r == 2 else 1), speeds) for r in range(4)]
    lines = report(ranks)
    assert len(lines) == 6
    assert re.split(" {2,}", lines[0])[3:] == ["own work ms", "all-reduce 1 MB GB/s", "all-reduce 16 MB GB/s"]
    assert lines[3].split() == ["2", "node1", "CPU", "30.00", "1.000", "2.000"]
    assert lines[5].startswith("slowest at its own work: rank 2 on node1, 3.00 × the median: every step waits for it →")
    even = report([Measured(r, "node0", "CPU", 0.010, speeds) for r in range(2)])
    assert "every step waits" not in even[-1]


def test_the_slower_one_of_two_is_told() -> None:
    ranks = [Measured(0, "a", "CPU", 0.01, {1: 1e9}), Measured(1, "b", "CPU", 0.04, {1: 1e9})]
    assert "rank 1 on b, 4.00 × the median: every step" in report(ranks)[-1]


def test_tasks_of_srun_become_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert srun_ranks({}) == {}
    assert srun_ranks({**STEP, "RANK": "0"}) == {}  # torchrun's
    assert srun_ranks({**STEP, "SLURM_STEP_NUM_TASKS": "1"}) == {}
    one_node = srun_ranks({**STEP, "SLURM_STEP_TASKS_PER_NODE": "4"})
    ranks = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_PORT": "20012"}
    assert one_node == {**ranks, "MASTER_ADDR": "127.0.0.1"}
    several = {**STEP, "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "node[1-2]"}
    assert srun_ranks({**several, "MASTER_ADDR": "node7"})["MASTER_ADDR"] == "node7"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match=r"SLURM_STEP_NODELIST=node\[1-2\]: .* → export MASTER_ADDR=HOST"):
        srun_ranks(several)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$3" = "node[1-2]" ] && echo node1 && echo node2\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    found = srun_ranks(several)
    assert (found["MASTER_ADDR"], found["LOCAL_WORLD_SIZE"]) == ("node1", "2")


@pytest.mark.slow
def test_two_ranks_are_measured_by_the_verb(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trainer.cli", "doctor", "--ranks", "2", "launch.rendezvous_seconds=120"]
    output = run(command, env=ON_CPU, cwd=tmp_path).output
    rows = re.findall(r"^(\d) +\S+ +CPU, 1 threads +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)$", output, re.MULTILINE)
    assert [row[0] for row in rows] == ["0", "1"], output
    assert all(float(value) > 0 for row in rows for value in row[1:]), output
    assert re.search(r"^slowest at its own work: rank [01] on \S+, ", output, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_in_one_line(tmp_path: Path) -> None:
    """And so is one that never comes, by the others: nothing waits for longer than it was told to."""
    port = str(20000 + os.getpid() % 10000)
    world = {**ON_CPU, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    waits = [sys.executable, "-m", "trainer.preflight", "--seconds", "12"]
    hangs = subprocess.Popen([sys.executable, "-c", HANGS], env={**os.environ, **world, "RANK": "1"}, cwd=tmp_path)
    try:
        met = run(waits, env={**world, "RANK": "0"}, cwd=tmp_path, timeout_seconds=120, check=False)
    finally:
        hangs.kill()
        hangs.wait()
    reason = r"\[rank 0\] error: work of its own: has not ended within 12 s \(rank 1 did not come\) → .*"
    assert re.fullmatch(reason, met.output.strip()), met.output
    assert met.returncode == 4
    waits[-1] = "3"
    alone = run(waits, env={**world, "RANK": "0"}, cwd=tmp_path, timeout_seconds=120, check=False)
    assert "rank 1 of 2 did not come within 3 s" in alone.output
    assert len(alone.output.strip().splitlines()) == 1, alone.output
    assert alone.returncode == 4


@pytest.mark.gpu
@pytest.mark.slow
def test_every_gpu_of_this_machine_is_measured(tmp_path: Path) -> None:
    gpus = visible_gpus()
    command = [sys.executable, "-m", "trainer.cli", "doctor", "--ranks", str(gpus)]
    output = run(command, env={"PYTHONPATH": str(ROOT)}, cwd=tmp_path).output
    assert len(re.findall(r"^\d+ .*\(cuda:\d+\)", output, re.MULTILINE)) == gpus
