"""Parameter groups: LoRA+, and what does not decay, equal transformers' and PEFT's own groups under every stage."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.group_cases import RESUMED, cases
from tests.helpers.cases import Cases, run_cases

SCRIPT = Path(__file__).with_name("group_cases.py")
NORM = 1e-5


@pytest.fixture(scope="module")
def seen(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return run_cases(SCRIPT, tmp_path_factory.mktemp("groups"))


@pytest.mark.parametrize(("option", "zero"), cases())
def test_every_group_is_that_of_the_plain_process(seen: Cases, option: str, zero: str) -> None:
    assert seen[f"{option} {zero}"] <= NORM


@pytest.mark.parametrize(("zero", "began", "then"), RESUMED)
def test_a_run_goes_on_as_it_began_unless_it_is_told_otherwise(seen: Cases, zero: str, began: str, then: str) -> None:
    found = seen[f"resumed {zero} {began} {then}"]
    assert found["decays_all"] == (began == "true" and then == "null")
    assert found["equal"] == (then == "null")


def test_state_moves_to_another_stage_to_the_bit(seen: Cases) -> None:
    assert seen["other stages"] == {"stage0": True, "stage1": True, "stage3": True}
