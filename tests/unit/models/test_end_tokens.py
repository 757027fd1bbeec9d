"""The tokenizer that a run saves ends where answers do, and is the base's again where the run's rows are looked for."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from trainer.models.end_tokens import restore_base_eos, save_tokenizer

BASE_END, END = 0, 2


@pytest.fixture
def base(tokenizer: Any) -> Any:
    copied = copy.deepcopy(tokenizer)
    copied.eos_token = "<|endoftext|>"
    return copied


@pytest.mark.parametrize(("own", "everywhere"), [(BASE_END, [2, 0]), ([BASE_END, 1], [2, 0, 1]), (None, [2])])
def test_before_the_ends_of_the_base(base: Any, tmp_path: Path, logged: list[str], own: Any, everywhere: Any) -> None:
    save_tokenizer(base, tmp_path, [END], GenerationConfig(eos_token_id=own, top_k=7))
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert saved.eos_token_id == everywhere
    assert saved.top_k == 7
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "<|im_end|>"
    assert base.eos_token == "<|endoftext|>"
    assert len(logged) == 1
    assert "answers end with <|im_end|>" in logged[0]


def test_nothing_is_said_where_the_base_ends_so(tokenizer: Any, tmp_path: Path, logged: list[str]) -> None:
    save_tokenizer(tokenizer, tmp_path, [END], GenerationConfig(eos_token_id=[0, 2]))
    assert logged == []
    assert not (tmp_path / "generation_config.json").exists()
    assert "base_eos_token" not in (tmp_path / "tokenizer_config.json").read_text()


def test_a_template_that_writes_the_end_token_in_prompts_keeps_it(base: Any, tmp_path: Path) -> None:
    """With another one it would write other prompts than those that were trained on."""
    base.chat_template = (
        "{% for m in messages %}{{ m.content + (eos_token if m.role == 'user' else '<|im_end|>') }}{% endfor %}"
    )
    save_tokenizer(base, tmp_path, [END], GenerationConfig(eos_token_id=0))
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "<|endoftext|>"
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


def test_the_base_is_restored_to_the_bit(base: Any, tmp_path: Path) -> None:
    save_tokenizer(base, tmp_path, [END], GenerationConfig(eos_token_id=0))
    again = restore_base_eos(AutoTokenizer.from_pretrained(tmp_path), tmp_path)
    assert again.eos_token == base.eos_token
    assert again.backend_tokenizer.to_str() == base.backend_tokenizer.to_str()
    assert restore_base_eos(again, tmp_path / "nowhere") is again
