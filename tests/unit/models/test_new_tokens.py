"""New tokens: in the tokenizer as transformers adds them, in the embeddings as plain means of rows; what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.new_tokens import enlarge, plain_tokenizer, save_tied
from trainer.config import load
from trainer.config.method import MethodConfig
from trainer.errors import ConfigError, ModelError
from trainer.models.loading import load_model, load_tokenizer
from trainer.models.new_tokens import check_vocabulary

NEW = ["quokka", "<|tool|>", "<think>"]
CONFIG = load(["debug=tiny", f"model.new_tokens={NEW}", "method.trainable_tokens=new"])
KEYS = CONFIG.model


@pytest.mark.parametrize(("tied", "rows"), [(False, None), (True, None), (False, 400), (True, 400)])
def test_the_embeddings_grow_as_far_as_they_must_and_start_as_means(
    tiny_model: Path, tmp_path: Path, tied: bool, rows: int | None
) -> None:
    save_tied(str(tiny_model), tmp_path, rows, tied)
    folder = str(tmp_path)
    written = {file: file.read_bytes() for file in tmp_path.iterdir()}
    model: Any = load_model(folder, KEYS, MethodConfig(), torch.float32, torch.device("cpu"), 2)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = enlarge(stock, folder, CONFIG).state_dict()
    assert model.config.vocab_size == len(model.lm_head.weight) == (rows or 387)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-7)
    again: Any = load_model(folder, KEYS, MethodConfig(), torch.float32, torch.device("cpu"), 2)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert written == {file: file.read_bytes() for file in tmp_path.iterdir()}, "rows written through to the file"


def test_the_tokenizer_is_transformers_own_with_these_tokens(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model), KEYS)
    stock = plain_tokenizer(str(tiny_model), CONFIG)
    assert tokenizer.backend_tokenizer.to_str() == stock.backend_tokenizer.to_str()
    ids = tokenizer("a quokka<|tool|> <think>it", add_special_tokens=False)["input_ids"]
    assert [i for i in ids if i >= 384] == [384, 385, 386]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a quokka <think>it", "a special one is not shown"
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


@pytest.mark.parametrize("token", ["<|im_end|>", "a", " the"])
def test_a_token_that_is_there_already_is_refused(tiny_model: Path, token: str) -> None:
    keys = copy.copy(KEYS)
    keys.new_tokens = [token]
    with pytest.raises(ConfigError, match="is one token of this tokenizer already"):
        load_tokenizer(str(tiny_model), keys)


def test_a_tokenizer_larger_than_the_embeddings_is_refused_by_the_token_without_a_row(
    model: Any, tokenizer: Any
) -> None:
    check_vocabulary(model, tokenizer)
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["one", "two"])
    with pytest.raises(
        ModelError, match=r"384 rows .* up to 385: 'one' would have no row .* resize_token_embeddings\(386\)"
    ):
        check_vocabulary(model, larger)
    model.resize_token_embeddings(400)
    check_vocabulary(model, larger)
