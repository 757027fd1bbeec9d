"""Two nodes with an address each: two network namespaces of this machine, joined by a cable."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT, Finished, run

KEYS = [
    *("debug=tiny", "batch.max_steps=3", "log=off", "eval.metrics=[loss]", "run.name=x"),
    *("launch=torchrun", "launch.nodes=2", "launch.nproc_per_node=1", "launch.rendezvous_seconds=20"),
]
NAMES = ("afina-node0", "afina-node1")
ADDRESS = "10.77.0.{}"
SETUP = f"""
set -e
ip netns add {NAMES[0]}; ip netns add {NAMES[1]}
ip link add afina0 type veth peer name afina1
ip link set afina0 netns {NAMES[0]}; ip link set afina1 netns {NAMES[1]}
ip netns exec {NAMES[0]} ip addr add {ADDRESS.format(1)}/24 dev afina0
ip netns exec {NAMES[1]} ip addr add {ADDRESS.format(2)}/24 dev afina1
for node in 0 1; do for card in lo afina$node; do ip netns exec afina-node$node ip link set $card up; done; done
"""


def _take_down() -> None:
    for name in NAMES:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.fixture(scope="module")
def nodes() -> Iterator[None]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs root and `ip` (apt-get install iproute2)")
    _take_down()
    made = subprocess.run(["sh", "-c", SETUP], capture_output=True, text=True, check=False)
    if made.returncode:
        _take_down()
        pytest.skip(f"needs network namespaces: {made.stderr.strip()}")
    yield
    _take_down()


def start(node: int, work: Path, master: str = ADDRESS.format(1), check: bool = True) -> Finished:
    """`afina train` on a node, without any variable that names a network."""
    afina = str(Path(sys.executable).with_name("afina"))
    keys = [*KEYS, f"run.dir={work}", f"launch.node_rank={node}", f"launch.master_address={master}"]
    command = ["ip", "netns", "exec", NAMES[node], "env", "-u", "GLOO_SOCKET_IFNAME", afina, "train", *keys]
    return run(command, cwd=ROOT, env={"OMP_NUM_THREADS": "1"}, timeout_seconds=120, check=check)


@pytest.mark.slow
def test_they_train_one_run_without_being_told_of_a_network(nodes: None, tmp_path: Path, tiny_model: Path) -> None:
    other = threading.Thread(target=start, args=(1, tmp_path))
    other.start()
    start(0, tmp_path)
    other.join()
    assert json.loads((tmp_path / "x" / "environment.json").read_text())["world_size"] == 2
    assert json.loads((tmp_path / "x" / "summary.json").read_text())["status"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("node", "master", "said"),
    [
        (0, ADDRESS.format(1), "the nodes have not met: "),
        (1, ADDRESS.format(9), "node 1 could not reach node 0 within 20 s"),
    ],
)
def test_a_node_that_is_alone_says_so_and_ends(
    node: int, master: str, said: str, nodes: None, tmp_path: Path, tiny_model: Path
) -> None:
    done = start(node, tmp_path, master, check=False)
    assert done.returncode == 4, done.output
    assert f"node {node} waits for " in done.output
    assert said in done.output
    assert "Traceback" not in done.output
