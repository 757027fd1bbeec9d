"""transformers: the attention that a model uses, what SDPA is there, quantised models, byte-level letters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trainer.compat import need, reach

LIBRARY = "transformers"


@reach("config._attn_implementation", until="there is a public getter beside `set_attn_implementation`")
def attention_name(model: Any) -> str:
    """Return the name of the attention kernel that the text part of a model uses.

    Raises:
        LaunchError: the configuration does not say it any more.
    """
    config = model.config.get_text_config()
    need(LIBRARY, config, "_attn_implementation")
    return str(config._attn_implementation)


@reach("model._is_stateful", until="a model says in public that its cache cannot be cut")
def is_stateful(model: Any) -> bool:
    """Return whether a model's layers carry a state from token to token; models of other code may lack the mark."""
    return bool(getattr(model, "_is_stateful", False))


@reach(
    "transformers.integrations.sdpa_attention.sdpa_attention_forward, transformers.masking_utils",
    upstream="https://github.com/huggingface/transformers/pull/45811",
    until="both are exported by `transformers`, as AttentionInterface and AttentionMaskInterface are",
)
def sdpa() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return transformers' own SDPA attention and the function that makes its masks.

    A kernel that is registered without a mask function gets no mask, and attends to everything in silence.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    return sdpa_attention_forward, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]


@reach("model.is_loaded_in_8bit", until="a model says in public how it is quantised")
def is_loaded_in_8bit(model: Any) -> bool:
    """Return whether a model was loaded by bitsandbytes in 8 bits; models that were not quantised lack the mark."""
    return bool(getattr(model, "is_loaded_in_8bit", False))


@reach("transformers.convert_slow_tokenizer.bytes_to_unicode", until="tokenizers exports its ByteLevel map")
def byte_of_letter() -> dict[str, int]:
    """Return the byte that each letter of byte-level tokens stands for."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}
