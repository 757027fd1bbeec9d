"""Heartbeats: which rank a verdict names, and that a rank which waits too long ends, unless somebody is at work."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trainer.distributed import heartbeat
from trainer.distributed.heartbeat import FOLDER, Heartbeat
from trainer.distributed.process_group import World
from trainer.distributed.verdict import SILENT_SECONDS, Beat, process_space, process_state, verdict

WAITS = """
import sys, time
from pathlib import Path
import torch
from trainer.distributed import heartbeat
from trainer.distributed.process_group import World
heartbeat.INTERVAL_SECONDS, heartbeat.GRACE_SECONDS = 0.05, 1.0
world = World(int(sys.argv[2]), 2, 0, torch.device("cpu"))
with heartbeat.Heartbeat(Path(sys.argv[1]), world, 0.5, print) as beat:
    beat.stage(sys.argv[3], 7)
    time.sleep(float(sys.argv[4]))
"""


def beat(rank: int, stage: str, *, step: int = 12, seconds: float = 40.0, age: float = 0.5, **more: str) -> Beat:
    return Beat(rank, f"node{rank}", 100 + rank, "elsewhere", step, stage, seconds, age=age, **more)


@pytest.mark.parametrize(
    ("beats", "named"),
    [
        ([beat(0, "reduce"), beat(1, "data", seconds=41)], "rank 1 (process 101 on node1), step 12, data: hangs"),
        ([beat(0, "reduce"), beat(1, "reduce", age=SILENT_SECONDS + 1)], "rank 1 .*: no sign of it for 9 s"),
        ([beat(0, "data", step=13), beat(1, "update")], "rank 1 .*step 12, update: hangs"),
        ([beat(0, "reduce"), beat(1, "reduce")], "all ranks wait in step 12, reduce"),
        ([beat(0, "reduce")], "rank 1 has never written"),
        (
            [beat(0, "reduce", age=20), beat(1, "data", failure="OSError: gone")],
            "rank 1 .*step 12, data: OSError: gone",
        ),
    ],
)
def test_the_rank_that_the_others_wait_for_is_named(beats: list[Beat], named: str) -> None:
    assert re.match(named.replace("(process 101 on node1)", r"\(process 101 on node1\)"), verdict(beats, 2))


def test_a_process_of_this_host_is_seen_to_be_stopped_or_gone() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    here = replace(beat(1, "data", age=0.0), pid=process.pid, processes=process_space())
    assert here.lost() is None
    process.send_signal(signal.SIGSTOP)
    while process_state(process.pid) is None:
        time.sleep(0.01)
    assert here.lost() == "its process is stopped"
    process.kill()
    while process_state(process.pid) in (None, "is stopped"):  # it takes a moment to die
        time.sleep(0.01)
    assert here.lost() == "its process was killed, or ended without a word"  # not yet waited for
    process.wait()
    assert here.lost() == "its process was killed, or ended without a word"


def waiting(folder: Path, rank: int, stage: str, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WAITS, str(folder), str(rank), stage, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)


def test_one_verdict_and_every_waiting_rank_ends(tmp_path: Path) -> None:
    ranks = [waiting(tmp_path, 0, "reduce", 60), waiting(tmp_path, 1, "data", 60)]
    said = [process.communicate(timeout=60)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [4, 4]
    (line,) = "".join(said).splitlines()
    assert "step 7, data: hangs" in line or "never written" in line


def test_a_rank_that_saves_does_not_wait_for_one_that_is_gone(tmp_path: Path) -> None:
    """Without gloo's word for it: NCCL has none."""
    gone, saving = waiting(tmp_path, 1, "save", 60), waiting(tmp_path, 0, "save", 60)
    while len(list((tmp_path / FOLDER).glob("rank-*.json"))) < 2:
        time.sleep(0.05)
    gone.kill()
    said = saving.communicate(timeout=60)[0]
    assert saving.returncode == 4
    assert "rank 1 (process" in said
    assert "was killed" in said


def test_a_long_failure_is_read_whole(tmp_path: Path) -> None:
    with Heartbeat(tmp_path, World(0, 1, 0, torch.device("cpu")), 60, print) as own:
        own.failed("ü\n" * 5000)
        assert own.explain().endswith("ü\n" * 250)


def test_nobody_ends_while_somebody_saves(tmp_path: Path) -> None:
    ranks = [waiting(tmp_path, 0, "save", 6), waiting(tmp_path, 1, "reduce", 5)]
    assert [process.wait(60) for process in ranks] == [0, 0]


def test_a_rank_that_nobody_waits_for_may_take_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "INTERVAL_SECONDS", 0.01)
    with Heartbeat(tmp_path, World(0, 1, 0, torch.device("cpu")), 0.05, print) as own:
        own.stage("data", 1)
        time.sleep(0.5)


def test_a_good_end_leaves_no_files(tmp_path: Path) -> None:
    world = World(0, 1, 0, torch.device("cpu"))
    with Heartbeat(tmp_path, world, 60, print) as own:
        own.stage("data", 1)
        assert (tmp_path / FOLDER / "rank-00000.json").exists()
        time.sleep(0.1)
    assert not (tmp_path / FOLDER).exists()
