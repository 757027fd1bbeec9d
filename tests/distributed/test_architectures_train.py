"""Every architecture under ZeRO-2 and ZeRO-3: the update of the plain process, and an adapter that stock PEFT loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.architecture_cases import PADDED, cases
from tests.helpers.processes import torchrun

SCRIPT = Path(__file__).with_name("architecture_cases.py")
UPDATE = 1e-5  # of every trained tensor, relative, Frobenius, after three steps
LOGITS = 1e-5


@pytest.mark.slow
def test_every_architecture_is_the_plain_process(tiny_model: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    torchrun(SCRIPT, results, nproc=2, env={"PYTHONPATH": str(SCRIPT.parents[2])}, timeout_seconds=600)
    found = json.loads(results.read_text())
    assert set(found) == set(cases())
    for case, (update, logits, uses_trie) in found.items():
        assert update <= UPDATE, (case, update)
        assert logits <= LOGITS, (case, logits)
        name = cases()[case][0]
        assert uses_trie == (name not in PADDED and "prompt" not in case), case
