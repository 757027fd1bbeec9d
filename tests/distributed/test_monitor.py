"""Runs that overfit on two ranks: they end with the best weights, stop early, and warn."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.monitor_cases import BEST_CASES
from tests.helpers.cases import Cases, run_cases

SCRIPT = Path(__file__).with_name("monitor_cases.py")


@pytest.fixture(scope="module")
def seen(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return run_cases(SCRIPT, tmp_path_factory.mktemp("monitor"))


@pytest.mark.parametrize("case", BEST_CASES)
def test_the_best_weights_are_kept(seen: Cases, case: str) -> None:
    """Those of another engine after exactly so many steps, to the bit; with their own scores in the summary."""
    found = seen[f"best {case}"]
    losses = {int(step): loss for step, loss in found["losses"].items() if step != "0"}
    best = found["best"]
    assert found["stopped"] == "2 evaluations in a row without a new best eval_loss"
    assert list(losses) == list(range(2, best + 5, 2))
    assert found["steps"] == best + 4 < 40
    assert losses[best] == min(losses.values()) == found["metrics"]["eval_loss"]
    assert found["metrics"] == found["expected"]
    assert found["equals the reference"]
    assert found["tensors"] >= 21
    assert best in found["kept"]
    assert len(found["kept"]) <= 2, "checkpoint.keep=1 and the best"
    if case.startswith("adalora"):
        assert best < 29 <= found["steps"], "its last ranks were taken after the best evaluation"
        assert found["ranks"] is None


@pytest.mark.parametrize("case", [case for case, (_, killed_after) in BEST_CASES.items() if killed_after])
def test_a_killed_run_ends_with_the_same_best_weights(seen: Cases, case: str) -> None:
    found = seen[f"best {case}"]
    assert found["killed"]
    assert found["same summary"]
    assert found["same weights"]


def test_a_best_that_cannot_be_saved_leaves_the_best_of_the_others(seen: Cases) -> None:
    found = seen["best on a full disk"]
    assert found["best"] == found["best of the others"] != found["lost"]
    assert found["metric"]
    assert len(found["logged"]) == 2, "before its evaluation, and once more as the best"
    for line in found["logged"]:
        assert f"the checkpoint of step {found['lost']} could not be written" in line


def test_overfitting_is_logged_once_a_crossing_and_ends_the_run_where_asked(seen: Cases) -> None:
    found = seen["overfitting"]
    above = {int(step): gap > 0.3 for step, gap in found["gaps"].items()}
    crossings = [step for step in above if above[step] and not above.get(step - 2, False)]
    assert sum(above.values()) > len(crossings) >= 1
    assert [int(line.partition("step ")[2].partition(":")[0]) for line in found["warnings"]] == crossings
    for line, step in zip(found["warnings"], crossings, strict=True):
        assert f"is {found['gaps'][str(step)]:.4f} above the mean training loss" in line
    stopped = found["stopped"]
    assert (stopped["status"], stopped["best_step"]) == ("finished", None)
    assert stopped["steps"] < 24
    assert stopped["stopped_early"].startswith("overfitting: eval_loss")
