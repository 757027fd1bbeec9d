"""``afina merge``: from a run on a 4-bit base to a plain folder that stock transformers loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import afina


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    work = tmp_path_factory.mktemp("merge")
    keys = ["debug=tiny", "method=qlora", "run.name=four", "optim.learning_rate=0.01", "eval.metrics=[loss]"]
    afina("train", *keys, cwd=work)
    return work / "runs" / "four"


def test_a_run_on_4_bits_is_merged_into_the_base_in_16(run: Path, tmp_path: Path) -> None:
    done = afina("merge", run, "--to", tmp_path / "merged", cwd=run.parents[1])
    assert "trained on a quantised base" in done.output
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "4 bits" in card
    assert "headlines.jsonl" in card
    assert str(run.parents[1]) not in card
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert next(model.parameters()).dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert "<|im_start|>" in tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    again = afina("merge", run, "--to", tmp_path / "merged", cwd=run.parents[1], check=False)
    assert (again.returncode, "is there already" in again.output) == (3, True)


def test_a_run_that_is_not_there_is_one_line(run: Path, tmp_path: Path) -> None:
    found = afina("merge", "for", "--to", tmp_path / "x", cwd=run.parents[1], check=False)
    assert found.returncode == 3
    assert "did you mean runs/four" in found.output
