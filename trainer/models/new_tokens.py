"""Add tokens to a tokenizer, and their rows to the embeddings, the same on every rank and at every load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import ConfigError, ModelError

ROWS_AT_A_TIME = 8192  # of the mean of a whole embedding, in fp64


def add_tokens(tokenizer: Any, wanted: Mapping[str, bool]) -> dict[str, int]:
    """Add tokens to a tokenizer, as transformers' ``add_tokens`` does.

    Args:
        tokenizer: a fast one, changed in place.
        wanted: whether each token is special (``trainer.config.new_tokens``).

    Returns:
        The id of each.

    Raises:
        ConfigError: a token is one of the tokenizer's already, or the tokenizer does not find it in a text.
    """
    known = tokenizer.get_vocab()
    for token in wanted:
        pieces = _encode(tokenizer, token)
        if token in known or (len(pieces) == 1 and pieces[0] != tokenizer.unk_token_id):
            hint = "leave it out; method.trainable_tokens takes tokens that the tokenizer has, too"
            raise ConfigError(
                "model.new_tokens", value=token, reason="is one token of this tokenizer already", hint=hint
            )
    for token, is_special in wanted.items():
        tokenizer.add_tokens([token], special_tokens=is_special)
    ids = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in wanted}
    for token, number in ids.items():
        if number not in _encode(tokenizer, token):
            reason = "is not found in a text by this tokenizer, which writes texts otherwise first (its normalizer)"
            raise ConfigError("model.new_tokens", value=token, reason=reason, hint="another spelling of it")
    return ids


def enlarge_embeddings(model: Any, tokenizer: Any, wanted: Mapping[str, bool]) -> None:
    """Give new tokens their rows in the input and the output embeddings, which grow as far as that needs.

    A row starts as the mean of the rows of the pieces that the tokenizer cuts the token into; of a special token,
    whose letters mean nothing, as the mean of all tokens' rows (transformers draws around that mean).

    Args:
        model: a causal LM, without adapters.
        tokenizer: of the base, without the new tokens; it gets them.
        wanted: whether each token is special.

    Raises:
        ConfigError: see :func:`add_tokens`.
        ModelError: the embeddings are smaller than the tokenizer already, or quantised.
    """
    check_vocabulary(model, tokenizer)
    size = vocabulary_size(tokenizer)
    if any(not table.is_floating_point() for table in _tables(model)):
        name, hint = getattr(model.config, "name_or_path", ""), "method.bits=16"
        raise ModelError("model.new_tokens", value=name, reason="its output layer is quantised: no row fits", hint=hint)
    pieces = [[] if special else _encode(tokenizer, token) for token, special in wanted.items()]
    ids = list(add_tokens(tokenizer, wanted).values())
    if max(ids) >= embedding_rows(model):
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    with torch.no_grad():
        for table in _tables(model):
            of_all = None if all(pieces) else _mean_row(table, range(size))  # once for all that want it
            table[ids] = torch.stack([_mean_row(table, some) if some else of_all for some in pieces]).to(table)


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer with ids that the embeddings have no rows for: an error now, not an index out of range in the
    first step that has such a token.

    Raises:
        ModelError: it is so; the first token without a row is named.
    """
    rows, size = embedding_rows(model), vocabulary_size(tokenizer)
    if size <= rows:
        return
    without = tokenizer.convert_ids_to_tokens(rows)
    raise ModelError(
        "model.name_or_path",
        value=getattr(model.config, "name_or_path", "") or type(model).__name__,
        reason=f"has {rows} rows of embeddings, and its tokenizer ids up to {size - 1}: {without!r} would have no row",
        hint=f"the base's own tokenizer and model.new_tokens; or resize_token_embeddings({size}) and save it",
    )


def vocabulary_size(tokenizer: Any) -> int:
    """Return how many rows of embeddings the ids of a tokenizer need: the largest one and 1."""
    return int(max(tokenizer.get_vocab().values())) + 1


def embedding_rows(model: Any) -> int:
    """Return how many rows the input embeddings have; often more than there are tokens."""
    return int(model.get_input_embeddings().weight.shape[0])


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _tables(model: Any) -> list[Tensor]:
    """Return what has a row a token: the weights of input and output embeddings, tied ones once, and a bias."""
    head: nn.Module | None = model.get_output_embeddings()
    found: list[Any] = [model.get_input_embeddings().weight]
    if head is not None:
        found += [table for name in ("weight", "bias") if (table := getattr(head, name, None)) is not None]
    return list({id(table): table for table in found}.values())


def _mean_row(table: Tensor, ids: Sequence[int]) -> Tensor:
    """Return the mean of some rows, summed in fp64, so that it is the same on any device."""
    chosen = torch.tensor(ids, device=table.device)
    sums = [table[some].double().sum(0) for some in chosen.split(ROWS_AT_A_TIME)]
    return torch.stack(sums).sum(0) / len(ids)
