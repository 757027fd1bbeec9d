"""Ranks that could never meet are refused, and the network between nodes is chosen."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest

from tests.helpers.processes import ROOT
from trainer.distributed import meeting
from trainer.distributed.meeting import choose_network, find_interface
from trainer.distributed.rendezvous import is_loopback, refuse_copies, refuse_tasks_a_node, slurm_port
from trainer.errors import LaunchError

NODES = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}


def test_srun_without_torchrun_is_refused() -> None:
    step = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8"}
    with pytest.raises(LaunchError, match=r"srun=8 tasks: starts as many copies .*--ntasks-per-node=1"):
        refuse_copies(step)
    refuse_copies({**step, "RANK": "0"})
    refuse_copies({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"})  # the batch script of eight tasks, not a step
    refuse_copies({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"})


@pytest.mark.parametrize("master", ["127.0.0.1", "localhost", "::1"])
def test_a_master_that_is_each_node_itself_is_refused(master: str) -> None:
    with pytest.raises(LaunchError, match="is each node itself"):
        choose_network({**NODES, "MASTER_ADDR": master}, "gloo")
    assert choose_network({**NODES, "MASTER_ADDR": master, "GLOO_SOCKET_IFNAME": "lo"}, "gloo") == {}
    assert choose_network({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": master}, "gloo") == {}


def test_nccl_finds_its_network_itself() -> None:
    assert choose_network({**NODES, "MASTER_ADDR": "192.0.2.7"}, "nccl") == {}


def test_the_interface_is_that_of_the_way_to_the_master(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the master its own name may be 127.0.1.1: then that of the way out counts."""
    cards = {"lo": "127.0.0.1", "eth0": "198.51.100.4", "ib0": "203.0.113.4"}
    addresses = {name: [SimpleNamespace(address=at)] for name, at in cards.items()}
    ways = {"203.0.113.9": "203.0.113.4", "127.0.1.1": "127.0.0.1", "192.0.2.1": "198.51.100.4"}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: addresses)
    monkeypatch.setattr(meeting, "_own_address", lambda there: ways.get(there[0]))
    assert find_interface("203.0.113.9") == "ib0"
    assert find_interface("127.0.1.1") == "eth0"
    ways["192.0.2.1"] = "127.0.0.1"
    with pytest.raises(LaunchError, match=r"no network but itself → GLOO_SOCKET_IFNAME"):
        find_interface("127.0.1.1")


def test_a_name_that_is_not_known_is_told() -> None:
    with pytest.raises(LaunchError, match=r"--master-addr=nowhere\.invalid: is not known here"):
        find_interface("nowhere.invalid")


@pytest.mark.parametrize(("host", "own"), [("127.0.0.1", True), ("::1", True), ("10.0.0.1", False), ("node0", False)])
def test_loopback(host: str, own: bool) -> None:
    assert is_loopback(host) is own


@pytest.mark.parametrize("tasks", ["1", "1(x4)", "1(x2),1"])
def test_one_task_a_node_is_taken(tasks: str) -> None:
    refuse_tasks_a_node(tasks)


@pytest.mark.parametrize("tasks", ["2", "8(x4)", "1(x2),2"])
def test_several_are_refused(tasks: str) -> None:
    with pytest.raises(LaunchError, match="starts as many torchruns on each node"):
        refuse_tasks_a_node(tasks)


def test_the_port_is_that_of_the_batch_script() -> None:
    """Below 32768, where Linux begins to hand out ports, and the user's own where there is one."""
    assert slurm_port({"SLURM_JOB_ID": "123456"}) == 23456
    assert slurm_port({"SLURM_JOB_ID": "7", "MASTER_PORT": "29501"}) == 29501
    script = (ROOT / "slurm" / "train.sbatch").read_text()
    assert "MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))" in script
