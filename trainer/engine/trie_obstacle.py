"""Name what keeps a model from running tries at all."""

from __future__ import annotations

import inspect
from typing import Any

from trainer.compat.transformers import attention_name
from trainer.kernels.trie_attention import KERNEL
from trainer.methods import is_prompt_learning
from trainer.methods.recurrent import recurrent_layers

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def trie_obstacle(model: Any) -> str | None:
    """Return why this model cannot run a trie at all; ``None`` when it can."""
    config = model.config.get_text_config()
    if (recurrent := recurrent_layers(model)) is not None:
        return f"its layers ({recurrent}) carry a state from token to token, which no tree can be laid for"
    if (attention := attention_name(model)) != KERNEL:
        return f"attention is {attention}, which knows padded rows only"
    if is_prompt_learning(model):
        return "virtual tokens stand before every row, and a trie has no place for them"
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return f"{type(base).__name__} takes no position ids"
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {r.get("rope_type") for r in ([rope] if "rope_type" in rope else rope.values()) if isinstance(r, dict)}
    if found := kinds & set(LENGTH_DEPENDENT_ROPE):
        return f"its rotary embedding ({', '.join(sorted(map(str, found)))}) depends on the length of the row"
    layers = set(getattr(config, "layer_types", None) or ())
    if odd := layers - {"full_attention", "sliding_attention"}:
        return f"its layers ({', '.join(sorted(odd))}) are not attention over single tokens"
    return None
