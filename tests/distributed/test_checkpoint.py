"""A run resumed on two ranks is the undisturbed one to the bit; another ZeRO stage takes its state; a full disk."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.distributed.checkpoint_cases import OLDER, OTHER_STAGES, RESUMED
from tests.helpers.cases import Cases, run_cases

SCRIPT = Path(__file__).with_name("checkpoint_cases.py")
# Masters, two moments and the live copy of each trained tensor of two layers.
FEWER_TENSORS = {"prompt": 4, "prefix": 4, "ia3": 4 * 14, "bottleneck": 4 * 16, "experts": 4 * 12}


@pytest.fixture(scope="module")
def seen(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return run_cases(SCRIPT, tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.parametrize("name", map(" ".join, RESUMED))
def test_resume_is_bit_identical(seen: Cases, name: str) -> None:
    found = seen[f"resume {name}"]
    assert found["first step"] == 3
    assert found["tensors"] >= FEWER_TENSORS.get(name.partition("method=")[2].split(" ")[0], 84)
    assert found["identical"]


@pytest.mark.parametrize("zero", OTHER_STAGES)
def test_state_moves_to_another_stage_to_the_bit(seen: Cases, zero: str) -> None:
    assert seen["other stages"][zero]


@pytest.mark.parametrize("zero", OLDER)
def test_an_older_checkpoint_of_all_weights_is_read_as_data(seen: Cases, zero: str) -> None:
    found = seen[f"older {zero}"]
    assert found["equal"]
    for without, with_trust in found["said"]:
        assert "is of version 0.1, in pickles" in without
        assert "checkpoint.trust_pickle=true" in without
        assert re.search(r"asks for more than data \((builtins\.)?exec\), and was not read$", with_trust)


def test_another_seed_is_refused(seen: Cases) -> None:
    assert "run.seed" in seen["other stages"]["another seed"]


def test_a_full_disk_on_one_rank_costs_a_checkpoint_and_not_the_run(seen: Cases) -> None:
    for rank in seen["full disk on rank 1"]:
        assert rank["saved"] == [False, True]
        assert rank["there"] == ["step-00000002"]
        (line,) = rank["logged"]
        assert "checkpoint of step 1 could not be written (rank 1:" in line
        assert "No space left on device" in line
