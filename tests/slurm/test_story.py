"""The story that examples/slurm_story tells is true: two nodes, a preemption, a sweep as an array, a report."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT, run

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_it_ends_well(tmp_path: Path) -> None:
    if not (ROOT / ".venv" / "bin" / "python").exists():
        pytest.skip(f"needs the environment that make makes, .venv; this is {sys.executable}")
    told = run(["bash", ROOT / "examples" / "slurm_story" / "run.sh", tmp_path / "story"], timeout_seconds=900).output
    assert "its adapter is byte for byte that of the" in told
    assert "five are finished, one of them after a requeue, and one has failed by itself" in told
