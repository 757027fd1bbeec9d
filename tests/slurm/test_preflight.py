"""`afina doctor --ranks` inside an allocation of two nodes, the line that it prints, and srun by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT
from tests.helpers.slurm_sandbox import Sandbox
from tests.slurm.conftest import LOOPBACK

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

SCRIPT = """#!/bin/bash
cd "$WHERE" || exit 2
$AFINA_PYTHON -P -m trainer.cli doctor launch=slurm launch.nodes=3 --ranks 1 > doctor.txt; echo "doctor $?"
eval "$(grep ^srun doctor.txt)"; echo "torchrun $?"
srun --ntasks-per-node=1 "$AFINA_PYTHON" -P -m trainer.preflight; echo "srun $?"
"""


def test_an_allocation_is_checked_and_its_nodes_meet(slurm: Sandbox, tmp_path: Path) -> None:
    script, log = tmp_path / "check.sbatch", tmp_path / "job.log"
    script.write_text(SCRIPT)
    environment = {**LOOPBACK, "WHERE": str(tmp_path), "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    options = ["--parsable", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2", f"--output={log}"]
    job = slurm.call("sbatch", *options, str(script), cwd=tmp_path, environment=environment)
    slurm.wait(job, timeout_seconds=240)
    text, doctor = log.read_text(), (tmp_path / "doctor.txt").read_text()
    found = re.findall(r"^(.+?) {2,}failed +(.*)$", doctor, re.MULTILINE)
    assert [check for check, _ in found] == ["nodes of the job"], doctor
    assert "2 (node[1-2]), launch.nodes asks 3" in found[0][1]
    assert re.search(r"^GPUs of the job +ok +2 on this node", doctor, re.MULTILINE)
    assert "doctor 4\n" in text
    assert "torchrun 0\n" in text
    assert "srun 0\n" in text
    assert len(re.findall(r"^[01]  .*CPU, \d+ threads(  +\d+\.\d+){4}$", text, re.MULTILINE)) == 4, text
    assert text.count("slowest at its own work: rank ") == 2
