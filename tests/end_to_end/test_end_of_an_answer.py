"""What ends an answer in training ends it in what is saved: stock ``generate`` stops there, with nothing said to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.tokenizers import write_rows
from tests.helpers.warm import afina
from trainer.models.embedded.tiny import CHATML

END, BASE_END = "<|im_end|>", "<|endoftext|>"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A base that ends its texts with another token than the template its answers, and rows soon learned."""
    folder = tmp_path_factory.mktemp("ends")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.eos_token, tokenizer.chat_template = BASE_END, None
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "chatml.jinja").write_text(CHATML)
    user, assistant = ({"role": role, "content": text} for role, text in (("user", "Say 7."), ("assistant", "text")))
    write_rows(folder / "rows.jsonl", [{"messages": [user, assistant]}] * 24)
    return folder


def train(work: Path, method: str, *keys: str) -> str:
    model = ["debug=tiny", f"model.name_or_path={work / 'base'}", f"method={method}", f"run.name={method}"]
    data = [
        "data=chat",
        "data.path=rows.jsonl",
        "data.template=chatml.jinja",
        "data.validation=0",
        "data.max_rows=null",
    ]
    steps = ["batch.epochs=10", "batch.max_steps=12", "eval.metrics=[loss]", "optim.learning_rate=0.01"]
    return afina("train", *model, *data, *steps, *keys, cwd=work).output


def answer(folder: Path, tokenizer_folder: Path | None = None) -> list[int]:
    """Answer as transformers does by itself."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_folder or folder)
    turns = [{"role": "user", "content": "Say 7."}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**prompt, max_new_tokens=30, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.eos_token == END
    assert tokenizer.decode(written) == f"text{END}"
    return written.tolist()


def ends(folder: Path) -> Any:
    return json.loads((folder / "generation_config.json").read_text())["eos_token_id"]


def test_a_model(work: Path) -> None:
    output = train(work, "full")
    said = [line for line in output.splitlines() if "answers end with" in line]
    assert said == [
        f"answers end with {END}: the saved generation_config.json and eos_token say so "
        f"(the base's own end: {BASE_END})"
    ]
    saved = work / "runs" / "full" / "model"
    assert len(answer(saved)) < 30
    assert ends(saved) == [2, 0]


def test_an_adapter_and_what_it_is_merged_into(work: Path) -> None:
    output = train(work, "lora", "method.r=16", "optim.learning_rate=0.05")
    assert f"answers end with {END}" in output
    run = work / "runs" / "lora"
    assert ends(run / "adapter") == [2, 0]
    assert AutoTokenizer.from_pretrained(run / "adapter").eos_token == END
    merged = afina("merge", run, "--to", work / "merged", cwd=work).output
    assert f"answers end with {END}" in merged
    assert len(answer(work / "merged")) < 30
    assert ends(work / "merged") == [2, 0]


def test_a_text_ends_as_the_base_does(work: Path) -> None:
    """Whatever the chat template writes: a text has no turns."""
    write_rows(work / "texts.jsonl", [{"text": f"the text {i}"} for i in range(24)])
    output = train(work, "lora", "data.path=texts.jsonl", "run.name=text", "data.format=auto")
    assert "answers end with" not in output
    assert "no end token" not in output
    assert AutoTokenizer.from_pretrained(work / "runs" / "text" / "adapter").eos_token == BASE_END
