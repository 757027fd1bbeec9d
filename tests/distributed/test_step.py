"""A step, an evaluation and an adapter on two ranks: loss, adapters, generation, quantised bases, fp16, failures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.step_cases import QUANTIZED, SKIPPED, ZERO
from tests.helpers.cases import Cases, run_cases

SCRIPT = Path(__file__).with_name("step_cases.py")


@pytest.fixture(scope="module")
def seen(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return run_cases(SCRIPT, tmp_path_factory.mktemp("step"))


def test_loss_equals_transformers(seen: Cases) -> None:
    assert seen["loss"] <= 1e-6


@pytest.mark.parametrize("zero", ZERO)
def test_adapter_loads_in_stock_peft(seen: Cases, zero: str) -> None:
    assert seen[f"adapter {zero}"]["distance"] <= 1e-4
    assert seen[f"adapter {zero}"]["changes the base by"] > 1e-2


@pytest.mark.parametrize("name", [*ZERO, *(f"{z} method=full" for z in ("stage2", "stage3"))])
def test_the_vocabulary_matrix_in_chunks_changes_nothing(seen: Cases, name: str) -> None:
    assert seen[f"chunks {name}"] <= 1e-5


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("zero", ZERO)
def test_not_finite_names_step_rank_and_rows(seen: Cases, zero: str, what: str) -> None:
    first, second = seen[f"not finite {what} {zero}"]["messages"]
    assert first == second
    assert f"step 2, rank 1: the {what} is not finite" in first
    assert "headlines.jsonl:" in first
    assert seen[f"not finite {what} {zero}"]["unchanged"], "the adapter of the step before must survive"


@pytest.mark.parametrize("case", map(" ".join, SKIPPED))
def test_a_skipped_step_is_as_if_it_were_not_there(seen: Cases, case: str) -> None:
    zero, what, method = case.split()
    found = seen[f"skipped {what} {zero} {method}"]
    assert found["records"] == [[1, 0], [2, 1], [3, 0], [4, 0]]
    assert found["equal"]


@pytest.mark.parametrize("zero", ["stage0", "stage2", "stage3"])
def test_a_rewound_run_goes_on_from_the_checkpoint(seen: Cases, zero: str) -> None:
    found = seen[f"rewound {zero}"]
    assert found["records"] == [[4, 2], [5, 0], [4, 2], [5, 0]]
    assert found["equal"] == [True, True]
    assert found["folders"] == ["step-00000002", "superseded-0-step-00000003"]


def test_generation_in_lockstep_equals_one_process(seen: Cases) -> None:
    assert seen["generation"]["rows"] > 8
    assert seen["generation"]["equal"]


@pytest.mark.parametrize("case", map(" ".join, QUANTIZED))
def test_quantised_base_learns_and_stays(seen: Cases, case: str) -> None:
    first, last = seen[case]["losses"]
    assert last < 0.7 * first
    assert seen[case]["base unchanged"]


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_fp16_supported(), reason="needs a CPU with fp16 arithmetic")
def test_fp16_overflow_is_skipped(seen: Cases) -> None:
    assert seen["fp16"]["scale"] == 2.0**39
    assert seen["fp16"]["changed nothing"]
    first, last = seen["fp16"]["losses"]
    assert last < 0.7 * first
