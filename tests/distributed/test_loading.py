"""Under ZeRO-3 no rank holds the whole model in memory of its own, not for a moment, and each gets its exact shares."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.loading_cases import CASES
from tests.helpers.cases import Cases, run_cases

SCRIPT = Path(__file__).with_name("loading_cases.py")


@pytest.fixture(scope="module")
def peaks(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Cases:
    folder = tmp_path_factory.mktemp("loading")
    # glibc keeps freed pieces of such sizes as the small tensors here have: what is looked for is what lives.
    return run_cases(SCRIPT, folder, folder / "model", env={"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}, cold=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_no_rank_holds_the_whole_model(peaks: Cases, case: str) -> None:
    whole, grown = peaks["whole"], peaks[case]
    # Two ranks: a share is half, a base in 4 bits somewhat more than a quarter; the rest is one tensor at a time.
    loading = 0.5 if "nf4" in case else 0.1
    assert all(bytes < loading * whole for bytes in grown["loading"])
    assert all(bytes < 0.75 * whole for bytes in grown["splitting"])
    assert grown["wrong"] == []
