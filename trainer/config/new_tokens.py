"""Read ``model.new_tokens``: which tokens the tokenizer gets, and which of them are special. No torch."""

from __future__ import annotations

import re

from trainer.config.schema import ModelConfig

ENTRIES = frozenset({"text", "special"})
"""Of an item that is a mapping."""
_CONTROL = re.compile(r"<\|.+\|>", re.DOTALL)


def new_tokens(model: ModelConfig) -> dict[str, bool]:
    """Return the tokens that the tokenizer gets, in order, and whether each is special; empty where it gets none.

    One of the form ``<|…|>`` is special: a control token, which in a row is so many characters unless
    ``data.control_tokens=parse``. An item ``{text: …, special: …}`` says it itself.

    Args:
        model: the ``model`` group, checked.
    """
    found: dict[str, bool] = {}
    for item in model.new_tokens or ():
        token, special = (item["text"], item["special"]) if isinstance(item, dict) else (item, None)
        found[token] = _CONTROL.fullmatch(token) is not None if special is None else special
    return found
