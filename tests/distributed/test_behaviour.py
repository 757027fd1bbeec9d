"""What must hold on two ranks besides the arithmetic: loss, adapters, resume, QLoRA, fp16, failures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.behaviour_cases import RESUMED
from tests.distributed.monitor_cases import CASES
from tests.helpers.processes import torchrun

SCRIPT = Path(__file__).with_name("behaviour_cases.py")
ZERO = ("stage0", "stage1", "stage2", "stage3")
# Masters, two moments and the live copy of each trained tensor of two layers.
FEWER_TENSORS = {"prompt": 4, "prefix": 4, "ia3": 4 * 14, "bottleneck": 4 * 16}


@pytest.fixture(scope="module")
def seen(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    results = tmp_path_factory.mktemp("behaviour") / "results.json"
    torchrun(SCRIPT, results, nproc=2, env={"PYTHONPATH": str(SCRIPT.parents[2])}, timeout_seconds=900)
    return json.loads(results.read_text())


def test_loss_equals_transformers(seen: dict[str, Any]) -> None:
    assert seen["loss distance"] <= 1e-6


@pytest.mark.parametrize("zero", ZERO)
def test_adapter_loads_in_stock_peft(seen: dict[str, Any], zero: str) -> None:
    assert seen[f"adapter {zero}"] <= 1e-4
    assert seen[f"adapter {zero} changes the base by"] > 1e-2


@pytest.mark.parametrize(
    "name",
    [
        *ZERO,
        *(f"{z} method=full" for z in ("stage0", "stage2", "stage3")),
        *(f"{z} model.dtype=bf16" for z in ("stage0", "stage2", "stage3")),
        *map(" ".join, RESUMED),
    ],
)
def test_resume_is_bit_identical(seen: dict[str, Any], name: str) -> None:
    facts = seen[f"resume {name}"]
    assert facts["first step"] == 3
    assert facts["tensors"] >= FEWER_TENSORS.get(name.partition("method=")[2].split(" ")[0], 84)
    assert facts["identical"]


@pytest.mark.parametrize("zero", ["stage0", "stage1", "stage3", "stage2_offload", "stage3_offload"])
def test_state_moves_to_another_stage_to_the_bit(seen: dict[str, Any], zero: str) -> None:
    assert seen[f"stage2 → {zero}"]


@pytest.mark.parametrize("name", [*ZERO, *(f"{z} method=full" for z in ("stage2", "stage3"))])
def test_the_vocabulary_matrix_in_chunks_changes_nothing(seen: dict[str, Any], name: str) -> None:
    assert seen[f"chunks {name}"] <= 1e-5


def test_another_seed_is_refused(seen: dict[str, Any]) -> None:
    assert "run.seed" in seen["another seed"]


@pytest.mark.parametrize("zero", ZERO)
def test_not_finite_names_step_rank_and_rows(seen: dict[str, Any], zero: str) -> None:
    facts = seen[f"not finite {zero}"]
    first, second = facts["messages"]
    assert first == second
    assert "step 2, rank 1: the loss is not finite" in first
    assert "headlines.jsonl:" in first
    assert facts["unchanged"], "the adapter of the step before must survive"


def test_a_full_disk_on_one_rank_costs_a_checkpoint_and_not_the_run(seen: dict[str, Any]) -> None:
    for facts in seen["full disk on rank 1"]:
        assert facts["saved"] == [False, True]
        assert facts["there"] == ["step-00000002"]
        (line,) = facts["said"]
        assert "checkpoint of step 1 could not be written (rank 1:" in line
        assert "file write failed" in line


def test_generation_in_lockstep_equals_one_process(seen: dict[str, Any]) -> None:
    assert seen["generation"]["rows"] > 8
    assert seen["generation"]["equal"]


@pytest.mark.parametrize("case", ["qlora stage2", "qlora stage3", "qlora_8bit stage2"])
def test_quantised_base_learns_and_stays(seen: dict[str, Any], case: str) -> None:
    first, last = seen[f"{case} losses"]
    assert last < 0.7 * first
    assert seen[f"{case} base unchanged"]


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_fp16_supported(), reason="needs a CPU with fp16 arithmetic")
def test_fp16_overflow_is_skipped(seen: dict[str, Any]) -> None:
    assert seen["fp16 scale after overflow"] == 2.0**39
    assert seen["fp16 overflow changed nothing"]
    first, last = seen["fp16 losses"]
    assert last < 0.7 * first


@pytest.mark.parametrize("case", CASES)
def test_the_best_weights_are_kept(seen: dict[str, Any], case: str) -> None:
    """Those of another engine after exactly so many steps, to the bit; with their own scores in the summary."""
    facts = seen[f"best {case}"]
    losses = {int(step): loss for step, loss in facts["losses"].items() if step != "0"}
    best = facts["best"]
    assert facts["stopped"] == "2 evaluations in a row without a new best eval_loss"
    assert list(losses) == list(range(2, best + 5, 2))
    assert facts["steps"] == best + 4 < 40
    assert losses[best] == min(losses.values()) == facts["metrics"]["eval_loss"]
    assert facts["metrics"] == facts["expected"]
    assert facts["equals the reference"]
    assert facts["tensors"] >= 21
    assert best in facts["kept"]
    assert len(facts["kept"]) <= 2, "checkpoint.keep=1 and the best"
    if case.startswith("adalora"):
        assert best < 29 <= facts["steps"], "its last ranks were taken after the best evaluation"
        assert facts["ranks"] is None


@pytest.mark.parametrize("case", [case for case, (_, killed_after) in CASES.items() if killed_after])
def test_a_killed_run_ends_with_the_same_best_weights(seen: dict[str, Any], case: str) -> None:
    facts = seen[f"best {case}"]
    assert facts["killed"]
    assert facts["same summary"]
    assert facts["same weights"]


def test_a_best_that_cannot_be_saved_leaves_the_best_of_the_others(seen: dict[str, Any]) -> None:
    facts = seen["best on a full disk"]
    assert facts["best"] == facts["best of the others"] != facts["lost"]
    assert facts["metric"]
    (said,) = facts["said"]
    assert f"the checkpoint of step {facts['lost']} could not be written" in said


def test_overfitting_is_told_once_a_crossing_and_ends_the_run_where_asked(seen: dict[str, Any]) -> None:
    facts = seen["overfitting"]
    above = {int(step): gap > 0.3 for step, gap in facts["gaps"].items()}
    crossings = [step for step in above if above[step] and not above.get(step - 2, False)]
    assert sum(above.values()) > len(crossings) >= 1
    assert [int(line.partition("step ")[2].partition(":")[0]) for line in facts["warnings"]] == crossings
    for line, step in zip(facts["warnings"], crossings, strict=True):
        assert f"is {facts['gaps'][str(step)]:.4f} above the mean training loss" in line
    stopped = facts["stopped"]
    assert (stopped["status"], stopped["best_step"]) == ("finished", None)
    assert stopped["steps"] < 24
    assert stopped["stopped_early"].startswith("overfitting: eval_loss")
