"""Tell models that do not answer a row with padding on its left as they answer the row alone."""

from __future__ import annotations

from typing import Any

from trainer.methods import is_prompt_learning

# Their state takes up padding, whatever the attention mask says: as measured on random models, the first answered token
# of a padded row (of MiniMax a later one) has other logits than that of the row alone.
READS_PADDING = frozenset({"recurrent_gemma", "minimax", "rwkv", "xlstm"})


def reads_left_padding(model: Any) -> bool:
    """Return whether rows of unlike lengths must not be answered together.

    With virtual tokens the padding stands between them and the row. PEFT counts positions through it in prompt tuning,
    and a sliding window counts it in prefix tuning too.
    """
    text = model.config.get_text_config()
    if text.model_type in READS_PADDING:
        return True
    if not is_prompt_learning(model):
        return False
    is_prefix = model.active_peft_config.peft_type == "PREFIX_TUNING"
    return not is_prefix or bool(getattr(text, "sliding_window", None))
