"""Every method × base precision × ZeRO stage that is not refused: the update of the plain process, and its adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.method_cases import IN_BF16, METHODS, overrides_of_cells
from tests.helpers.processes import torchrun
from trainer.config.rules.matrix import cells, refusal

SCRIPT = Path(__file__).with_name("method_cases.py")
UPDATE = 1e-5  # of every trained tensor, relative, Frobenius, after three steps (AdaLoRA: five)
# The quantised base is the same on both sides and is computed with in fp32; what is left is the order of sums, which
# AdaLoRA's five steps on 4 bits amplify to 1.8e-5.
UPDATE_QUANTISED = 5e-5
LOGITS = 1e-4
# bf16 is measured, not promised: this only tells rounding from a wrong gradient.
UPDATE_BF16, LOGITS_BF16 = 0.2, 5e-2


@pytest.mark.parametrize("methods", ["full,lora,rslora", "dora,adalora,ia3", "prompt,prefix,bottleneck"])
def test_every_cell_is_the_plain_process(methods: str, tiny_model: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    env = {"PYTHONPATH": str(SCRIPT.parents[2])}
    torchrun(SCRIPT, results, methods, nproc=2, env=env, timeout_seconds=600)
    found = json.loads(results.read_text())
    assert set(found) == set(overrides_of_cells(methods.split(",")))
    print({case: value for case, value in found.items() if IN_BF16 in case})
    for case, (update, logits) in found.items():
        in_bf16 = IN_BF16 in case
        assert update <= (UPDATE_BF16 if in_bf16 else UPDATE if " 16 " in case else UPDATE_QUANTISED), (case, update)
        assert logits <= (LOGITS_BF16 if in_bf16 else LOGITS), (case, logits)


def test_no_cell_is_left_out() -> None:
    works = {" ".join(map(str, key)) for key, cell in cells().items() if refusal(cell) is None}
    assert set(overrides_of_cells(list(METHODS))) == works | {f"{method} {IN_BF16}" for method in METHODS}
