"""New tokens the stock way, written out: transformers' own tokenizer and resizing, means of rows, PEFT's own keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.config import TrainConfig

NEW = 'model.new_tokens=["the","<|tool|>"]'  # one that rows have, one that only the softmax sees


def save_tied(folder: str, to: Path, rows: int | None = None, tied: bool = True) -> None:
    """A model as it is, but for a tied output layer, and rows that no token has."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, tie_word_embeddings=tied)
    if rows:
        model.resize_token_embeddings(rows)
    model.save_pretrained(to)
    AutoTokenizer.from_pretrained(folder).save_pretrained(to)


def plain_tokenizer(folder: str, config: TrainConfig) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for token in config.model.new_tokens or []:
        tokenizer.add_tokens([token], special_tokens=token.startswith("<|"))
    return tokenizer


def enlarge(model: Any, folder: str, config: TrainConfig) -> Any:
    """Rows for the new tokens: the mean of a word's pieces, of a special token the mean of all."""
    if not config.model.new_tokens:
        return model
    before = AutoTokenizer.from_pretrained(folder)
    size = len(before)
    if size + len(config.model.new_tokens) > len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(len(plain_tokenizer(folder, config)), mean_resizing=False)
    tables = {id(layer.weight): layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
    for place, token in enumerate(config.model.new_tokens):
        pieces = before(token, add_special_tokens=False).input_ids
        rows = list(range(size)) if token.startswith("<|") else pieces
        for table in tables.values():
            with torch.no_grad():
                table[size + place] = table[rows].mean(0)
    return model


def scramble(model: Any, config: TrainConfig) -> Any:
    """Noise in the new rows: what a stock resize leaves there; an adapter that is whole brings its own."""
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        for place in range(len(config.model.new_tokens or [])):
            with torch.no_grad():
                layer.weight[len(layer.weight) - 1 - place].normal_()
    return model


def peft_keys(model: Any, folder: str, config: TrainConfig) -> dict[str, Any]:
    """What a LoraConfig is told of the embeddings."""
    method, head = config.method, model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    keys: dict[str, Any] = {}
    if method.modules_to_save:
        keys = {"modules_to_save": list(method.modules_to_save), "ensure_weight_tying": tied}
    if method.trainable_tokens is not None:
        tokens = config.model.new_tokens if method.trainable_tokens == "new" else method.trainable_tokens
        ids = sorted(plain_tokenizer(folder, config).convert_tokens_to_ids(list(tokens)))
        keys["trainable_token_indices"] = ids if tied else {"embed_tokens": ids, "lm_head": ids}
    return keys
