"""A run whose ranks are killed at five points ends with the undisturbed run's bits; a rank that is killed, stopped or
fails is named, with its step and stage, and nobody waits for it for ever. ``benchmarks/chaos.py`` counts to 200."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.helpers.processes import ROOT, run


def test_killed_runs_end_alike_and_lost_ranks_are_named(tiny_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "chaos.py"), "--kills=5", "--cases=8", "--minutes=0"]
    done = run(
        [*command, "--seed=1", "--verdicts=3", "--twice=1", "--damaged=60", f"--out={tmp_path / 'chaos.md'}"],
        timeout_seconds=400,
    )
    table = (tmp_path / "chaos.md").read_text()
    assert table.startswith("# Killed and started again\n\n5 kills in "), done.tail()
    assert "named in 3 of 3 cases" in table
    assert "none was loaded in 60" in table
