"""Under ZeRO-3 no rank holds the whole model in memory of its own, not for a moment, and each gets its exact shares."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.loading_cases import CASES
from tests.helpers.processes import torchrun

SCRIPT = Path(__file__).with_name("loading_cases.py")


@pytest.mark.slow
def test_no_rank_holds_the_whole_model(tiny_model: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    folder = tmp_path / "model"
    # glibc keeps freed pieces of such sizes as the small tensors here have: what is looked for is what lives.
    env = {"PYTHONPATH": str(SCRIPT.parents[2]), "MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
    torchrun(SCRIPT, results, folder, nproc=2, env=env, timeout_seconds=300)
    found = json.loads(results.read_text())
    assert set(found) == {"whole", *CASES}
    whole = found["whole"]
    for case in CASES:
        # Two ranks: a share is half, a base in 4 bits somewhat more than a quarter; the rest is one tensor at a time.
        loading = 0.5 if "nf4" in case else 0.1
        assert all(grown < loading * whole for grown in found[case]["loading"]), (case, whole, found[case])
        assert all(grown < 0.75 * whole for grown in found[case]["splitting"]), (case, whole, found[case])
        assert found[case]["wrong"] == []
