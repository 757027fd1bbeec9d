"""Tell models whose layers carry a state from token to token: Mamba's, linear attention's, a convolution's."""

from __future__ import annotations

from typing import Any

from trainer.compat.transformers import is_stateful

RECURRENT_LAYERS = frozenset({"linear_attention", "conv", "hybrid", "mamba", "recurrent"})  # in a config's layer_types


def recurrent_layers(model: Any) -> str | None:
    """Return what the layers of a model that carry a state are called; ``None`` where there are none."""
    kinds = RECURRENT_LAYERS & set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return ", ".join(sorted(kinds)) or ("recurrent" if is_stateful(base) else None)
