"""Every optimizer × option of ``zero`` that is not refused: the update of its own library, and resumed to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.optimizer_cases import TRANSFERRED, is_amplified, list_cells
from tests.helpers.cases import Cases, run_cases
from tests.helpers.plain_optimizers import PLAIN
from trainer.config.rules.optimizers import optimizer_cells, optimizer_refusal

SCRIPT = Path(__file__).with_name("optimizer_cases.py")
UPDATE = 1e-5  # of every trained tensor, relative, Frobenius, after five steps
# Codes of 8 bits on the shares of ZeRO turn with the last bit of a clipped gradient: to 5e-5, and 0 without clipping.
# Shares that were cut otherwise would be 2e-2 away.
UPDATE_8BIT = 1e-4
MOMENTS_ELSEWHERE = 0.05  # codes of 8 bits in other blocks, relative, Frobenius: 0.03 seen

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def seen(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return run_cases(SCRIPT, tmp_path_factory.mktemp("optimizers"))


@pytest.mark.parametrize("case", list_cells())
def test_every_cell_is_its_library_and_resumes_to_the_bit(seen: Cases, case: str) -> None:
    found = seen[case]
    assert found["update"] <= (UPDATE_8BIT if "8bit" in case and is_amplified(case) else UPDATE)
    assert found["gone back"]
    assert found["resumed"]


@pytest.mark.parametrize(
    ("name", "zero"), [(name, zero) for name, stages in TRANSFERRED.items() for zero in stages[1:]]
)
def test_a_checkpoint_goes_to_other_stages(seen: Cases, name: str, zero: str) -> None:
    found = seen[f"{name} elsewhere"][zero]
    assert found["weights"]
    assert found["moments"] <= (MOMENTS_ELSEWHERE if "8bit" in name else 0)


@pytest.mark.parametrize("name", PLAIN)
def test_a_checkpoint_of_another_optimizer_is_refused(seen: Cases, name: str) -> None:
    ranks = seen["refused"][name]
    assert len(set(ranks)) == 1
    assert (f"optim.name={name}: was adamw" in ranks[0]) == (name != "adamw")


def test_no_cell_is_left_out() -> None:
    works = {f"{name} {zero}" for (name, zero), cell in optimizer_cells().items() if optimizer_refusal(cell) is None}
    assert works - set(list_cells()) == {f"adamw {zero}" for zero in ("stage0", "stage1", "stage2", "stage3")} | {
        f"adamw {zero}_offload" for zero in ("stage2", "stage3")
    }
