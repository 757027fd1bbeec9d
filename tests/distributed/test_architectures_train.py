"""Every architecture under ZeRO-2 and ZeRO-3: the update of the plain process, and an adapter that stock PEFT loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.architecture_cases import PADDED, cases
from tests.helpers.cases import Cases, run_cases

SCRIPT = Path(__file__).with_name("architecture_cases.py")
UPDATE = 1e-5  # of every trained tensor, relative, Frobenius, after three steps
LOGITS = 1e-5


@pytest.fixture(scope="module")
def seen(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return run_cases(SCRIPT, tmp_path_factory.mktemp("architectures"))


@pytest.mark.slow
@pytest.mark.parametrize("case", cases())
def test_every_architecture_is_the_plain_process(seen: Cases, case: str) -> None:
    update, logits, uses_trie = seen[case]
    assert update <= UPDATE
    assert logits <= LOGITS
    name = cases()[case][0]
    assert uses_trie == (name not in PADDED and "prompt" not in case)
