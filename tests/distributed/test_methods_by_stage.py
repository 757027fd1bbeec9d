"""Every method × base precision × ZeRO stage that is not refused: the update of the plain process, and its adapter."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.distributed.method_cases import HEADS, IN_BF16, METHODS, list_cells
from tests.helpers.cases import Cases, run_cases
from trainer.config.rules.matrix import cells, refusal

SCRIPT = Path(__file__).with_name("method_cases.py")
UPDATE = 1e-5  # of every trained tensor, relative, Frobenius, after three steps (AdaLoRA: five)
# The quantised base is the same on both sides and is computed with in fp32; what is left is the order of sums, which
# AdaLoRA's five steps on 4 bits amplify to 1.8e-5.
UPDATE_QUANTISED = 5e-5
LOGITS = 1e-4
# bf16 is measured, not promised: this only tells rounding from a wrong gradient.
UPDATE_BF16, LOGITS_BF16 = 0.2, 5e-2


# Each a start of its own.
GROUPS = (
    "full,lora,rslora",
    "dora,adalora,ia3",
    "prompt,prefix,bottleneck,experts",
    "lora_new_tokens,lora_modules_to_save",
)


@pytest.fixture(scope="module")
def seen(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Cases]:
    """By the group of methods: each case's distances of update and logits, from one start of all of the group."""

    @cache
    def run(group: str) -> Cases:
        return run_cases(SCRIPT, tmp_path_factory.mktemp("methods"), group)

    return run


@pytest.mark.parametrize(
    ("group", "case"), [(group, case) for group in GROUPS for case in list_cells(group.split(","))]
)
def test_every_cell_is_the_plain_process(seen: Callable[[str], Cases], group: str, case: str) -> None:
    update, logits = seen(group)[case]
    in_bf16 = IN_BF16 in case
    if in_bf16:
        print(f"distances of update and logits: {update}, {logits}")
    assert update <= (UPDATE_BF16 if in_bf16 else UPDATE if " 16 " in case or case in HEADS else UPDATE_QUANTISED)
    assert logits <= (LOGITS_BF16 if in_bf16 else LOGITS)


def test_no_cell_is_left_out() -> None:
    works = {" ".join(map(str, key)) for key, cell in cells().items() if refusal(cell) is None}
    assert set(list_cells(list(METHODS))) == works | {f"{method} {IN_BF16}" for method in METHODS} | set(HEADS)
