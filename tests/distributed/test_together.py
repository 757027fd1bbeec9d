"""Trials that are trained together come to what each comes to alone, in every way of cutting the work."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.distributed.together_cases import BITS, CELLS, UPPER, UPPER_CELLS, names
from tests.helpers.cases import Cases, run_cases

SCRIPT = Path(__file__).with_name("together_cases.py")
# Of every trained tensor, relative, Frobenius, to the run by itself: padded, one rank, ZeRO stage 0, no kernels.
BOUNDS = {"16": 1e-5, "4": 5e-5}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def seen(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Cases]:
    """By the number of ranks: each case's distances by trial. The lone runs are made once, on one rank."""
    lone = tmp_path_factory.mktemp("lone")

    @cache
    def run(ranks: int) -> Cases:
        if ranks > 1:
            run(1)
        return run_cases(SCRIPT, tmp_path_factory.mktemp("together"), lone, nproc=ranks)

    return run


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("bits", "case"), [(bits, case) for bits in BITS for case in CELLS[bits]])
def test_each_trial_is_a_run_by_itself(seen: Callable[[int], Cases], bits: str, case: str, ranks: int) -> None:
    distances = seen(ranks)[case]
    assert set(distances) == set(names(bits))
    assert max(distances.values()) <= BOUNDS[bits], distances


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", UPPER_CELLS)
def test_layers_that_no_trial_adapts_are_shared(seen: Callable[[int], Cases], case: str, ranks: int) -> None:
    distances = seen(ranks)[case]
    assert set(distances) == set(UPPER)
    assert max(distances.values()) <= BOUNDS["16"], distances


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_order_of_the_grid_makes_no_difference(seen: Callable[[int], Cases], ranks: int) -> None:
    distances = seen(ranks)["other order"]
    assert max(distances.values()) <= BOUNDS["16"], distances
