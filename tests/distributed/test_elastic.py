"""Across restarts the number of ranks and the ZeRO stage change: the state is taken over to the bit, and five steps so
are five steps of one plain process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.elastic_cases import METHODS, STARTS
from tests.helpers.cases import Cases, run_cases

SCRIPT = Path(__file__).with_name("elastic_cases.py")


@pytest.fixture(scope="module")
def starts(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Cases]:
    runs = tmp_path_factory.mktemp("runs")
    return [
        run_cases(SCRIPT, tmp_path_factory.mktemp(f"start-{k}"), str(runs), str(k), nproc=ranks)
        for k, (ranks, _, _) in enumerate(STARTS)
    ]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_at_any_size_and_stage(starts: list[Cases], method: str) -> None:
    found = [cases[method] for cases in starts]
    assert [f["first"] for f in found] == [0, 1, 2, 3, 4]
    assert all(f["saved"] and f["same state"] for f in found)
    assert found[-1]["distance"] <= (5e-5 if method == "qlora" else 1e-5)
