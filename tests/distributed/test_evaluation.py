"""Scores on several ranks and under ZeRO-3 are those of one plain process, whose rows are answered one by one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.evaluation_cases import ZERO
from tests.helpers.cases import Cases, run_cases

SCRIPT = Path(__file__).with_name("evaluation_cases.py")


@pytest.fixture(scope="module")
def scores(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return run_cases(SCRIPT, tmp_path_factory.mktemp("evaluation"))


@pytest.mark.parametrize("zero", ZERO)
def test_every_metric_is_that_of_stock_transformers(scores: Cases, zero: str) -> None:
    found, expected = scores[zero]["found"], scores[zero]["expected"]
    for name, value in expected.items():
        assert found[name] == (value if name == "answers" else pytest.approx(value, rel=1e-5)), name
    assert len(set(expected["answers"])) > 5
