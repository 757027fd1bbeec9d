"""Name what keeps a model from virtual tokens before every row (prompt and prefix tuning of stock PEFT)."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from trainer.methods.recurrent import recurrent_layers


def prompt_obstacle(model: Any, method_name: str) -> str | None:
    """Return why a model cannot be given virtual tokens; ``None`` when it can.

    Each was seen: training may go well, and then the first answer that is generated raises.

    Args:
        model: the base.
        method_name: prompt (embeddings before the row's own) or prefix (keys and values before those of every row).
    """
    text = model.config.get_text_config()
    if any(hasattr(module, "rope_deltas") for module in model.modules()):
        return "its positions have three dimensions and are counted without virtual tokens"
    if method_name == "prefix":
        return _prefix_obstacle(model)
    if getattr(text, "hidden_size_per_layer_input", None):
        return "its layers have embeddings of their own, and a virtual token has no id to look them up by"
    first = next((child for child in model.children() if isinstance(child, PreTrainedModel)), model)
    words = model.get_input_embeddings()
    if not any(module is words for module in first.modules()):
        return "PEFT looks for the word embeddings in the tower that stands first"
    return None


def _prefix_obstacle(model: Any) -> str | None:
    if (recurrent := recurrent_layers(model)) is not None:
        return f"layers ({recurrent}) have a state in the place of keys and values, and PEFT does not train that"
    if getattr(model.config.get_text_config(), "is_heterogeneous", False):
        return "the keys of its layers have unlike widths, and a prefix has one"
    return None
