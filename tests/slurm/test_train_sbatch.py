"""`sbatch slurm/train.sbatch` on a real Slurm with two virtual nodes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT
from tests.helpers.slurm_sandbox import Sandbox
from tests.slurm.conftest import LOOPBACK

pytestmark = pytest.mark.slurm


def submit(
    slurm: Sandbox, tmp_path: Path, *options: str, overrides: list[str], **environment: str
) -> tuple[dict[str, str], str]:
    """Run a job of the checkout's script to its end; returns what Slurm says of it, and its log."""
    log = tmp_path / "job.log"
    script = str(ROOT / "slurm" / "train.sbatch")
    command = ["sbatch", "--parsable", f"--output={log}", *options, script, *overrides]
    job = slurm.call(*command, cwd=ROOT, environment={**LOOPBACK, **environment})
    fields = slurm.wait(job, timeout_seconds=240)
    return fields, log.read_text()


def test_two_nodes_train_one_run(slurm: Sandbox, tmp_path: Path, tiny_model: Path) -> None:
    overrides = ["debug=tiny", f"run.dir={tmp_path}/runs"]
    fields, log = submit(slurm, tmp_path, "--nodes=2", overrides=overrides)
    assert (fields["JobState"], fields["ExitCode"]) == ("COMPLETED", "0:0"), log

    runs = [folder for folder in (tmp_path / "runs").iterdir() if folder.is_dir()]
    assert len(runs) == 1, runs
    assert json.loads((runs[0] / "summary.json").read_text())["status"] == "finished"
    assert json.loads((runs[0] / "environment.json").read_text())["world_size"] == 2
    assert len(list(runs[0].glob("wandb/*run-*"))) == 1
    steps = [json.loads(line)["step"] for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == len(set(steps))


def test_a_wrong_key_fails_the_job_and_says_why(slurm: Sandbox, tmp_path: Path) -> None:
    fields, log = submit(slurm, tmp_path, "--nodes=2", overrides=["debug=tiny", "method.rr=4"])
    assert (fields["JobState"], fields["ExitCode"]) == ("FAILED", "2:0")
    assert log.startswith("error: method.rr")
    assert log.count("\n") == 1
    assert not (tmp_path / "runs").exists()
