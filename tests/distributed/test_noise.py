"""NEFTune's noise on two ranks gives the update of one plain process that has the same noise."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.noise_cases import CASES
from tests.helpers.cases import Cases, run_cases

SCRIPT = Path(__file__).with_name("noise_cases.py")
NORM = 1e-5


@pytest.fixture(scope="module")
def seen(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return run_cases(SCRIPT, tmp_path_factory.mktemp("noise"))


@pytest.mark.parametrize("case", CASES)
def test_noise_is_that_of_the_plain_process(seen: Cases, case: str) -> None:
    assert seen[case] <= NORM
