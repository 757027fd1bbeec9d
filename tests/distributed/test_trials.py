"""Several trials on one engine: each is its plain process, a run of its own, and nothing to the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.trials_cases import ZERO
from tests.helpers.cases import Cases, run_cases

SCRIPT = Path(__file__).with_name("trials_cases.py")


@pytest.fixture(scope="module", params=[1, 2], ids=["one_rank", "two_ranks"])
def seen(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Cases:
    packing = "trie" if request.param == 2 else "padded"
    return run_cases(SCRIPT, tmp_path_factory.mktemp("trials"), f"batch.packing={packing}", nproc=request.param)


@pytest.mark.parametrize("zero", ZERO)
def test_each_trial_is_its_plain_process(seen: Cases, zero: str) -> None:
    """Unlike rates, betas, weight decay, clipping, ranks and targets; five steps, the last two on a second engine."""
    assert seen[zero]["distances"].keys() == {"trial_0", "trial_1", "trial_2"}
    assert max(seen[zero]["distances"].values()) <= 1e-5


@pytest.mark.parametrize("zero", ZERO)
def test_a_trial_that_fails_is_untouched_and_the_others_go_on(seen: Cases, zero: str) -> None:
    found = seen[zero]
    assert found["finite"] == [[True, True, True, False]] * 2
    assert (found["failed"], found["applied"]) == ([False, "inf"], [True] * 3)
    assert found["failed is untouched"]
    assert found["counts"] == [[3.0], [2.0]]


@pytest.mark.parametrize("zero", ZERO)
def test_a_trial_that_is_not_named_keeps_its_bits(seen: Cases, zero: str) -> None:
    assert seen[zero]["not named"] == [False, True, True]
    assert seen[zero]["moved"] == [True] * 3


@pytest.mark.parametrize("zero", ZERO)
def test_a_checkpoint_goes_from_a_view_to_a_run_of_its_own_and_back(seen: Cases, zero: str) -> None:
    found = seen[zero]
    assert found["restored alone"]
    assert found["distance alone"] <= 1e-5
    assert found["restored together"]
    assert found["others at a restore"] == [True, True]
    assert found["counts at the end"] == [[5.0], [5.0]]
    assert max(found["scores"]) <= 1e-5


@pytest.mark.parametrize("zero", ZERO)
def test_the_adapter_of_a_view_is_that_of_a_run_of_its_own(seen: Cases, zero: str) -> None:
    assert seen[zero]["adapter"] == [True] * 3


@pytest.mark.parametrize("zero", ZERO)
def test_trials_that_are_kept_keep_their_bits(seen: Cases, zero: str) -> None:
    assert seen[zero]["rebuilt"] == [True] * 3
    assert seen[zero]["adapters"] == ["trial_0", "trial_1", "trial_2"]
