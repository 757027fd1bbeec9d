"""Multimodal wrappers: the text part's update is that of the plain process, and stock PEFT loads what was saved."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.wrapper_cases import cases
from tests.helpers.cases import Cases, run_cases

SCRIPT = Path(__file__).with_name("wrapper_cases.py")
UPDATE = 1e-5  # of every trained tensor, relative, Frobenius, after three steps
LOGITS = 1e-5
PADDED = {
    "llama4 wrapper": "its attention is chunked",
    "qwen3_5 wrapper": "its attention is linear in one layer",
}


@pytest.fixture(scope="module")
def seen(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return run_cases(SCRIPT, tmp_path_factory.mktemp("wrappers"))


@pytest.mark.slow
@pytest.mark.parametrize("case", cases())
def test_the_text_part_of_every_wrapper_is_the_plain_process(seen: Cases, case: str) -> None:
    update, logits, untouched, uses_trie = seen[case]
    assert update <= UPDATE
    assert logits <= LOGITS
    assert untouched == []
    name = cases()[case][0]
    assert uses_trie == (name not in PADDED and not case.endswith(("prompt", "prefix")))
