"""Every architecture under ZeRO: the update of the plain process, an adapter that stock PEFT loads, and its merge."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.distributed.architecture_cases import cases
from tests.helpers.architecture_table import TABLE
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
    found, row = seen[case], TABLE[cases()[case][0]]
    assert found["update"] <= UPDATE
    assert found["logits"] <= LOGITS
    assert found["no gradient"] == []
    if "prompt" in case:
        assert not found["trie"]
    else:
        assert found["trie"] == (row.padded == "")
        assert re.search(row.padded or "None", str(found["obstacle"]))
    sets = {"attention_min": row.query_value, "attention": row.attention, "all_linear": row.linear}
    assert found["sets"] == {wanted: sorted(names) for wanted, names in sets.items()}
    assert found["left out"] == sorted(row.left_out)
    if "lora" in case:
        assert found["odd keys"] == []
        if row.unmergeable:
            assert re.search(row.unmergeable, found["merge refused"])
        else:
            assert found["merged"] <= LOGITS < found["effect"]
