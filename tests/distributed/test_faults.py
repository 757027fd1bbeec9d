"""A rank that is stopped, or killed, is named in one line with its host and step, and nobody waits for it for ever."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT, stop_tree
from trainer.tracking.files import read_metrics

LONG = ("debug=tiny", "run.name=lost", "batch.epochs=2000", "batch.max_steps=9000", "eval.before=false", "log=off")


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_lost_rank_is_named_and_the_others_end(tiny_model: Path, tmp_path: Path, number: signal.Signals) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
        "--local-addr=127.0.0.1",
        "--shutdown-timeout=2",
    ]
    command += ["-m", "trainer.train", *LONG, "fault.timeout_seconds=10"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "out.txt").open("w") as out:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=out, stderr=out)
        try:
            run = tmp_path / "runs" / "lost"
            wait_until_trained(run, process)
            os.kill(json.loads((run / "heartbeats" / "rank-00001.json").read_text())["pid"], number)
            began = time.monotonic()
            code = process.wait(120)
        finally:
            stop_tree(process)
    output = (tmp_path / "out.txt").read_text()
    assert code != 0
    assert time.monotonic() - began < 75, "torchrun itself gives a stopped process 30 s"
    (line,) = (line for line in output.splitlines() if line.startswith("error: ") or "] error: " in line)
    assert "rank 1 (process" in line
    assert "no sign of it" in line
    assert json.loads((run / "summary.json").read_text())["status"] == "failed"


def wait_until_trained(run: Path, process: subprocess.Popen[bytes]) -> None:
    for _ in range(1200):
        assert process.poll() is None
        if (run / "metrics.jsonl").exists() and len(read_metrics(run)) > 3:
            return
        time.sleep(0.1)
    raise AssertionError("no step in two minutes")
