"""Choose the class that loads a checkpoint: a causal language model, or a wrapper of one with its vision tower."""

from __future__ import annotations

from typing import Any

from trainer.errors import ModelError


def loader_class(folder: str, revision: str | None, trust_remote_code: bool) -> Any:
    """Return the class of transformers whose ``from_pretrained`` loads the whole of a checkpoint.

    The checkpoint's own config decides: a wrapper is loaded as the wrapper that it was saved as, also where
    ``AutoModelForCausalLM`` would take the text part out of it, or knows no model for its config.

    Args:
        folder: a local folder or hub id.
        revision: of a hub model.
        trust_remote_code: the checkpoint's own code may be run.

    Raises:
        ModelError: it is an encoder-decoder.
        OSError, ValueError: its config cannot be found or read.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    config = AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=trust_remote_code)
    kind = type(config)
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForCausalLM
    saved_as = config.architectures or ()
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING and MODEL_FOR_CAUSAL_LM_MAPPING[kind].__name__ in saved_as:
        return AutoModelForCausalLM
    if config.is_encoder_decoder:
        reason = f"is an encoder-decoder ({kind.model_type}), and rows of text train a decoder"
        raise ModelError("model.name_or_path", value=folder, reason=reason, hint="a causal language model")
    return AutoModelForImageTextToText
