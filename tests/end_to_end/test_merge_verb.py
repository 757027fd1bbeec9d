"""``afina merge``: from a run on a 4-bit base to a plain folder that stock transformers loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.warm import afina


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    work = tmp_path_factory.mktemp("merge")
    keys = ["debug=tiny", "method=qlora", "run.name=four", "optim.learning_rate=0.01", "eval.metrics=[loss]"]
    afina("train", *keys, cwd=work)
    return work / "runs" / "four"


@pytest.fixture(scope="module")
def merged(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("to") / "merged"
    done = afina("merge", run, "--to", folder, cwd=run.parents[1])
    assert "trained on a quantised base" in done.output
    return folder


def test_the_folder_is_a_plain_model_that_answers_alone(merged: Path, tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(merged)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    turns = [{"role": "user", "content": "Say something."}]
    laid_out = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    base = AutoTokenizer.from_pretrained(tiny_model).apply_chat_template(turns, add_generation_prompt=True)
    assert laid_out["input_ids"][0].tolist() == base["input_ids"]
    written = model.generate(**laid_out, max_new_tokens=4, do_sample=False)
    assert written.shape[1] > len(base["input_ids"])
    assert next(model.parameters()).dtype == torch.float32


def test_nothing_of_the_training_is_left_in_the_configuration(merged: Path, tiny_model: Path) -> None:
    """The 4 bits, the kernel, the cache that was off: all but the dtype is the base's own."""
    for name, own in (("config.json", {"dtype", "transformers_version"}), ("generation_config.json", set())):
        mine, base = (json.loads((folder / name).read_text()) for folder in (merged, tiny_model))
        differ = {key for key in mine.keys() | base.keys() if mine.get(key) != base.get(key)}
        assert differ <= own | {"transformers_version"}, name
    assert not list(merged.glob("adapter*"))


def test_the_card_tells_where_it_comes_from(merged: Path, run: Path) -> None:
    card = (merged / "README.md").read_text()
    summary = json.loads((run / "summary.json").read_text())
    for told in ("4 bits", "headlines.jsonl", "LoRA", f"{summary['steps']} updates", "eval_loss", "to the bit"):
        assert told in card
    assert str(run.parents[1]) not in card


def test_a_folder_that_is_there_is_left_alone(merged: Path, run: Path) -> None:
    again = afina("merge", run, "--to", merged, cwd=run.parents[1], check=False)
    assert (again.returncode, "is there already" in again.output) == (3, True)


def test_a_run_that_is_not_there_is_one_line(run: Path, tmp_path: Path) -> None:
    found = afina("merge", "for", "--to", tmp_path / "x", cwd=run.parents[1], check=False)
    assert found.returncode == 3
    assert "did you mean runs/four" in found.output
