"""A run with new tokens: resumed to the bit, asked, merged, reloaded by stock PEFT and transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.warm import afina
from trainer.inference.run_model import load_run

TEXT = "Is the quokka <|tool|> asleep?"
KEYS = ["debug=tiny", 'model.new_tokens=[quokka,"<|tool|>"]', "method.trainable_tokens=new", "method.r=4", "log=off",
        "optim.learning_rate=0.01", "data.path=rows.jsonl", "eval.metrics=[loss]", "batch.max_steps=4"]  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    work = tmp_path_factory.mktemp("new_tokens")
    rows = (f'{{"instruction": "Count {n} of them.", "output": "{n} quokka <|tool|>"}}\n' for n in range(90))
    (work / "rows.jsonl").write_text("".join(rows))
    said = afina("train", *KEYS, "run.name=whole", cwd=work).output
    assert "no row has <|tool|>, so nothing is learned about it; data.control_tokens=parse" in " ".join(said.split())
    afina("train", *KEYS, "run.name=parts", "run.stop_at_step=2", cwd=work, check=False)
    afina("train", *KEYS, "run.name=parts", "run.stop_at_step=null", cwd=work)
    return work


def logits(model: AutoModelForCausalLM, tokenizer: AutoTokenizer) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokenizer(TEXT)["input_ids"]])).logits


def test_a_resumed_run_has_the_same_tensors_to_the_bit(work: Path) -> None:
    whole, parts = (
        load_file(work / "runs" / name / "adapter/adapter_model.safetensors") for name in ("whole", "parts")
    )
    assert sum("trainable_tokens_delta" in name for name in whole) == 2
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_stock_peft_and_the_merged_folder_say_the_same(work: Path, tiny_model: Path) -> None:
    run = work / "runs/whole"
    own = load_run(run)
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    assert own.tokenizer(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    base.resize_token_embeddings(len(tokenizer))
    expected = logits(own.model, tokenizer)
    assert torch.equal(logits(PeftModel.from_pretrained(base, run / "adapter").eval(), tokenizer), expected)
    afina("merge", run, "--to", "merged", cwd=work)
    merged = AutoModelForCausalLM.from_pretrained(work / "merged", dtype=torch.float32)
    assert len(AutoTokenizer.from_pretrained(work / "merged")) == len(merged.lm_head.weight) == 386
    found = logits(merged, AutoTokenizer.from_pretrained(work / "merged"))
    assert float((found - expected).norm() / expected.norm()) <= 1e-5


def test_it_is_asked_with_the_adapter_and_without(work: Path) -> None:
    for more in ([], ["--no-adapter"]):
        afina("generate", "runs/whole", "A quokka?", "generate.max_new_tokens=2", *more, cwd=work)
    losses = [eval_loss("runs/whole", *more, cwd=work) for more in ([], ["--adapter", "base"])]
    assert losses[0] != losses[1], "the adapter has learned"


def eval_loss(*arguments: str, cwd: Path) -> str:
    """What `afina eval` says of the loss."""
    (line,) = (line for line in afina("eval", *arguments, cwd=cwd).output.splitlines() if "eval_loss" in line)
    return line
