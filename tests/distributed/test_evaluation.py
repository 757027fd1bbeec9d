"""Scores on several ranks and under ZeRO-3 are those of one plain process, whose rows are answered one by one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.processes import torchrun

SCRIPT = Path(__file__).with_name("evaluation_cases.py")


def test_every_metric_is_that_of_stock_transformers(tiny_model: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    torchrun(SCRIPT, results, nproc=2, env={"PYTHONPATH": str(SCRIPT.parents[2])}, timeout_seconds=300)
    found = json.loads(results.read_text())
    assert set(found) == {"stage0", "stage2", "stage3"}
    for zero, both in found.items():
        for name, value in both["expected"].items():
            expected = value if name == "answers" else pytest.approx(value, rel=1e-5)
            assert both["found"][name] == expected, (zero, name)
        assert len(set(both["expected"]["answers"])) > 5
