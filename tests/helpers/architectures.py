"""Tiny random models: one of each kind of position, window and head, and every architecture that is held to work."""

from __future__ import annotations

from functools import partial
from typing import Any

import transformers

VOCABULARY = 40
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # attention far from uniform: a wrong mask shows
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SIZES: dict[str, Any] = {**COMMON, "num_key_value_heads": 2, "pad_token_id": 0}
SIZES_OF_GPT2: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
GPT2: dict[str, Any] = {
    **SIZES_OF_GPT2,
    "initializer_range": 0.3,
    "resid_pdrop": 0,
    "embd_pdrop": 0,
    "attn_pdrop": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# name -> class of the config, and its keys
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SIZES),
    "mistral, window 8": ("MistralConfig", {**SIZES, "sliding_window": 8}),
    "qwen2": ("Qwen2Config", SIZES),
    "qwen3": ("Qwen3Config", {**SIZES, "head_dim": 8}),
    "gemma": ("GemmaConfig", {**SIZES, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**SIZES, "head_dim": 8, "sliding_window": 8}),
    "gemma3": (
        "Gemma3TextConfig",
        {**SIZES, "head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi": ("PhiConfig", COMMON),
    "phi3": ("Phi3Config", SIZES),
    "gpt2": ("GPT2Config", GPT2),
    "gpt_neox": ("GPTNeoXConfig", COMMON),
    "mixtral": ("MixtralConfig", {**SIZES, "num_local_experts": 4}),
}


def tiny(name: str, **changes: Any) -> Any:
    """A random model of an architecture, some keys of its config changed; drawn from torch's global generator."""
    kind, keys = ARCHITECTURES[name]
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**keys, **changes}))


MODELS = {name: partial(tiny, name) for name in ("llama", "mistral, window 8", "qwen2", "gemma", "gpt2")}
