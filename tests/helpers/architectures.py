"""The one table of tiny random models: a row an architecture, with its sizes and the names of its layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
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
HEADS_OF_8 = {**SIZES, "head_dim": 8}
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.3,
    "resid_pdrop": 0,
    "embd_pdrop": 0,
    "attn_pdrop": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
QKVO, MLP = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"}), frozenset({"gate_proj", "up_proj", "down_proj"})


@dataclass(frozen=True)
class Architecture:
    """A class of transformers' configs with its keys, and the names of the linear layers (Llama's unless given).

    Attributes:
        query_value: what ``attention_min`` means.
        attention: what ``attention`` means.
        linear: what ``all_linear`` means.
        down: the last layer of the MLP; empty where that is no linear layer.
        attention_end: the last layer of attention, with the name of its parent.
        left_out: linear layers that ``all_linear`` leaves out.
        unmergeable: why its adapters cannot be merged, as a pattern; empty where they can.
        padded: why no tries can be used, as a pattern; empty where they can.
        positions: the config's key of the length of a row.
        vocabularies: the config's keys of the number of tokens.
    """

    config: str
    keys: dict[str, Any] = field(default_factory=lambda: SIZES)
    query_value: frozenset[str] = frozenset({"q_proj", "v_proj"})
    attention: frozenset[str] = QKVO
    linear: frozenset[str] = QKVO | MLP
    down: str = "down_proj"
    attention_end: str = "self_attn.o_proj"
    left_out: frozenset[str] = frozenset()
    unmergeable: str = ""
    padded: str = ""
    positions: str = "max_position_embeddings"
    vocabularies: tuple[str, ...] = ("vocab_size",)


# Every architecture that is held to work.
ARCHITECTURES = {
    "llama": Architecture("LlamaConfig"),
    "mistral, window 8": Architecture("MistralConfig", {**SIZES, "sliding_window": 8}),
    "qwen2": Architecture("Qwen2Config"),
    "qwen3": Architecture("Qwen3Config", HEADS_OF_8),
    "gemma": Architecture("GemmaConfig", HEADS_OF_8),
    "gemma2": Architecture("Gemma2Config", {**HEADS_OF_8, "sliding_window": 8}, padded="attention is eager"),
    "gemma3": Architecture(
        "Gemma3TextConfig",
        {**HEADS_OF_8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi": Architecture(
        "PhiConfig",
        COMMON,
        attention=frozenset({"q_proj", "k_proj", "v_proj", "dense"}),
        linear=frozenset({"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}),
        down="fc2",
        attention_end="self_attn.dense",
    ),
    "phi3": Architecture(
        "Phi3Config",
        query_value=frozenset({"qkv_proj"}),
        attention=frozenset({"qkv_proj", "o_proj"}),
        linear=frozenset({"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
    ),
    "gpt2": Architecture(
        "GPT2Config",
        GPT2,
        query_value=frozenset({"c_attn"}),
        attention=frozenset({"c_attn", "attn.c_proj"}),
        linear=frozenset({"c_attn", "c_proj", "c_fc"}),
        down="mlp.c_proj",
        attention_end="attn.c_proj",
        positions="n_positions",
    ),
    "gpt_neox": Architecture(
        "GPTNeoXConfig",
        COMMON,
        query_value=frozenset({"query_key_value"}),
        attention=frozenset({"query_key_value", "dense"}),
        linear=frozenset({"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
        down="dense_4h_to_h",
        attention_end="attention.dense",
    ),
    # The experts are no linear layers.
    "mixtral": Architecture("MixtralConfig", {**SIZES, "num_local_experts": 4}, linear=QKVO, down=""),
}
# Mixtures with linear layers beside the stacked experts.
MIXTURES = {
    "shared experts": Architecture(
        "Qwen2MoeConfig",
        {**SIZES, "num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
    ),
    "first layer dense": Architecture(
        "Qwen3MoeConfig",
        {**HEADS_OF_8, "num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 16, "mlp_only_layers": [0]},
        linear=QKVO,  # PEFT would take the dense layer's gate_proj, up_proj and down_proj for the experts'
    ),
}
# What one test or another needs: logits that are scaled, no attention at all.
OTHERS = {
    "cohere": Architecture("CohereConfig", {**SIZES, "logit_scale": 0.25}),
    "granite": Architecture("GraniteConfig", {**SIZES, "logits_scaling": 4.0}),
    "mamba": Architecture("MambaConfig", {"num_hidden_layers": 2, "hidden_size": 32}),
}
# One of each kind of position, window and head.
KINDS_OF_ATTENTION = ("llama", "mistral, window 8", "qwen2", "gemma", "gpt2")


def tiny(name: str, **changes: Any) -> Any:
    """Return a random model of an architecture, some keys of its config changed, from torch's global generator."""
    return random_model({**ARCHITECTURES, **MIXTURES, **OTHERS}[name], **changes)


def random_model(row: Architecture, **changes: Any) -> Any:
    """Return a random model of a row, some keys of its config changed, from torch's global generator."""
    config = getattr(transformers, row.config)(**{**row.keys, **changes})
    return transformers.AutoModelForCausalLM.from_config(config)


def llama_2_7b() -> Any:
    """Return Llama-2-7B on the meta device: its shapes and no weights."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig())
