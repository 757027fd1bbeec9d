"""Tell how many positions a model has."""

from __future__ import annotations

from typing import Any

from torch import nn

from trainer.methods.text_part import text_modules

# What the architectures of transformers call a table of learned positions.
TABLES = ("wpe", "embed_positions", "position_embedding", "position_embeddings")


def learned_positions(model: nn.Module) -> int | None:
    """Return how many positions a model with a table of learned ones has: no row can be longer. ``None``: it has none,
    as with rotary embeddings, which can be computed for any position."""
    names = (name.rpartition(".")[2] for name, module in text_modules(model) if isinstance(module, nn.Embedding))
    return trained_positions(model) if any(name in TABLES for name in names) else None


def trained_positions(model: Any) -> int | None:
    """Return for how many positions the model's configuration says that it was made; ``None``: it does not say."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(found) if found else None
