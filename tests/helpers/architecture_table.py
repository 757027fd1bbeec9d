"""The table of tiny random architectures that are trained, saved, loaded by stock PEFT and merged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tests.helpers.architectures import (
    ARCHITECTURES,
    COMMON,
    GPT2,
    HEADS_OF_8,
    MIXTURES,
    MLP,
    OTHERS,
    QKVO,
    SIZES,
    VOCABULARY,
    Architecture,
    random_model,
)

NO_SDPA = "attention is eager, which knows padded rows only"
STATE = r"its layers \(.*\) carry a state from token to token"
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
QKV_OUT = frozenset({"q_proj", "k_proj", "v_proj", "out_proj"})
FUSED = frozenset({"query_key_value", "dense"})
FUSED_LINEAR = FUSED | {"dense_h_to_4h", "dense_4h_to_h"}
COMPRESSED = frozenset({"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"})
NO_DROPOUT = {"resid_dropout": 0, "embed_dropout": 0, "attention_dropout": 0}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA = {"state_size": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "hidden_size": 32}
MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "mamba_d_conv": 4,
}
NOTHING: frozenset[str] = frozenset()

DENSE = {
    "cohere": OTHERS["cohere"],
    "granite": OTHERS["granite"],
    "falcon": Architecture(
        "FalconConfig",
        COMMON,
        query_value=frozenset({"query_key_value"}),
        attention=FUSED,
        linear=FUSED_LINEAR,
        down="dense_4h_to_h",
        attention_end="self_attention.dense",
        padded="attention is sdpa, which knows padded rows only",
    ),
    "bloom": Architecture(
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0},
        query_value=frozenset({"query_key_value"}),
        attention=FUSED,
        linear=FUSED_LINEAR,
        down="dense_4h_to_h",
        attention_end="self_attention.dense",
        padded=NO_SDPA,
    ),
    "mpt": Architecture(
        "MptConfig",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
        query_value=frozenset({"Wqkv"}),
        attention=frozenset({"Wqkv", "out_proj"}),
        linear=frozenset({"Wqkv", "out_proj", "up_proj", "down_proj"}),
        attention_end="attn.out_proj",
        positions="max_seq_len",
        padded=NO_SDPA,
    ),
    "opt": Architecture(
        "OPTConfig",
        {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 0, "dropout": 0.0},
        attention=QKV_OUT,
        linear=QKV_OUT | {"fc1", "fc2"},
        down="fc2",
        attention_end="self_attn.out_proj",
    ),
    "starcoder2": Architecture(
        "Starcoder2Config",
        {**SIZES, "residual_dropout": 0.0, "embedding_dropout": 0.0},
        linear=QKVO | {"c_fc", "c_proj"},
        down="mlp.c_proj",
    ),
    "gptj": Architecture(
        "GPTJConfig",
        {**GPT2, "rotary_dim": 4},
        attention=QKV_OUT,
        linear=QKV_OUT | {"fc_in", "fc_out"},
        down="fc_out",
        attention_end="attn.out_proj",
        positions="n_positions",
        padded=NO_SDPA,
    ),
    "gpt_neo": Architecture(
        "GPTNeoConfig",
        {**COMMON, **NO_DROPOUT, "attention_types": [[["global", "local"], 1]], "window_size": 8, "num_layers": 2},
        attention=QKV_OUT,
        linear=QKV_OUT | {"c_fc", "c_proj"},
        down="mlp.c_proj",
        attention_end="attention.out_proj",
        padded=NO_SDPA,
    ),
    "cohere2": Architecture("Cohere2Config", {**HEADS_OF_8, **SLIDING, "logit_scale": 0.25}),
    "glm4": Architecture("Glm4Config", HEADS_OF_8, linear=QKVO | {"gate_up_proj", "down_proj"}),
    "olmo2": Architecture("Olmo2Config"),
    "gemma4": Architecture(
        "Gemma4TextConfig",
        {**HEADS_OF_8, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
        | {"sliding_window": 8, "global_head_dim": 16, "num_kv_shared_layers": 2}
        | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY},
        linear=QKVO | MLP | {"per_layer_input_gate", "per_layer_model_projection", "per_layer_projection"},
        vocabularies=("vocab_size", "vocab_size_per_layer_input"),
    ),
    "smollm3": Architecture("SmolLM3Config", {**SIZES, "no_rope_layers": [1, 0]}),
    "nemotron": Architecture("NemotronConfig", HEADS_OF_8, linear=QKVO | {"up_proj", "down_proj"}),
}
# Their experts are stacked in three dimensions.
MORE_MIXTURES = {
    **MIXTURES,
    "llama4": Architecture(
        "Llama4TextConfig",
        {**HEADS_OF_8, "num_local_experts": 4, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2},
        padded="chunked_attention",
    ),
    "deepseek_v3": Architecture(
        "DeepseekV3Config",
        {**SIZES, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1}
        | {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "q_lora_rank": 8, "kv_lora_rank": 8}
        | {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 1}
        | {"n_group": 2, "topk_group": 1},
        query_value=frozenset({"q_b_proj", "kv_b_proj"}),
        attention=COMPRESSED,
        linear=COMPRESSED,  # of the MLPs PEFT would take the names for the experts'
    ),
    "gpt_oss": Architecture("GptOssConfig", {**HEADS_OF_8, **EXPERTS, **SLIDING}, linear=QKVO, padded=NO_SDPA),
    "olmoe": Architecture("OlmoeConfig", {**SIZES, "num_experts": 4, "num_experts_per_tok": 2}, linear=QKVO),
    "granitemoe": Architecture("GraniteMoeConfig", {**SIZES, **EXPERTS}, linear=QKVO),
}
# Layers with a state. What of them is left out has its weight read past it.
OF_MAMBA = Architecture(
    "MambaConfig",
    {**MAMBA, "num_hidden_layers": 2, "vocab_size": VOCABULARY},
    query_value=NOTHING,
    attention=NOTHING,
    linear=frozenset({"in_proj"}),
    left_out=frozenset({"x_proj", "dt_proj", "out_proj"}),
)
ROWS_WITH_A_STATE = {
    "mamba": OF_MAMBA,
    "falcon_mamba": replace(OF_MAMBA, config="FalconMambaConfig"),
    "mamba2": Architecture(
        "Mamba2Config",
        {**MAMBA, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
        | {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
        query_value=NOTHING,
        attention=NOTHING,
        linear=frozenset({"in_proj"}),
        left_out=frozenset({"out_proj"}),
    ),
    "falcon_h1": Architecture(
        "FalconH1Config",
        {**HEADS_OF_8, **MAMBA2, "mamba_d_ssm": 64},
        linear=QKVO | MLP | {"in_proj"},
        left_out=frozenset({"out_proj"}),
    ),
    "nemotron_h": Architecture(
        "NemotronHConfig",
        {**HEADS_OF_8, "num_hidden_layers": 4, "layers_block_type": ["mamba", "attention", "mlp", "moe"]}
        | {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8}
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        | {"moe_shared_expert_intermediate_size": 16},
        linear=QKVO | {"up_proj", "down_proj", "in_proj"},
        left_out=frozenset({"out_proj"}),
    ),
    "jamba": Architecture(
        "JambaConfig",
        {**SIZES, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4}
        | {"expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2},
        linear=QKVO | MLP | {"in_proj", "x_proj", "out_proj"},
        left_out=frozenset({"dt_proj"}),
    ),
    "recurrent_gemma": Architecture(
        "RecurrentGemmaConfig",
        {**HEADS_OF_8, "lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"]},
        linear=QKVO | MLP | {"linear_x", "linear_y", "linear_out"},
    ),
    "bamba": Architecture(
        "BambaConfig",
        {**SIZES, **MAMBA2, "attn_layer_indices": [1]},
        linear=QKVO | MLP | {"in_proj"},
        left_out=frozenset({"out_proj"}),
    ),
    "zamba2": Architecture(
        "Zamba2Config",
        {**SIZES, "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]}
        | {"num_key_value_heads": 4, "mamba_d_state": 8, "mamba_headdim": 16, "n_mamba_heads": 4}
        | {"mamba_ngroups": 1, "chunk_size": 8, "num_mem_blocks": 1, "adapter_rank": 4},
        linear=QKVO | {"gate_up_proj", "down_proj", "in_proj", "linear"},
        left_out=frozenset({"out_proj", "gate_up_proj_adapter_list"}),
        unmergeable=r"layers\.3\.shared_transformer.* has the same weight as .*layers\.1\.shared_transformer",
    ),
    "lfm2": Architecture(
        "Lfm2Config",
        {**SIZES, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
        attention=frozenset({"q_proj", "k_proj", "v_proj", "self_attn.out_proj"}),
        linear=QKV_OUT | {"in_proj", "w1", "w2", "w3"},
        down="w2",
    ),
    "granitemoehybrid": Architecture(
        "GraniteMoeHybridConfig",
        {**SIZES, **MAMBA2, **EXPERTS, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
        linear=QKVO | {"in_proj", "input_linear", "output_linear"},
        left_out=frozenset({"out_proj"}),
    ),
    "qwen3_next": Architecture(
        "Qwen3NextConfig",
        {**HEADS_OF_8, "layer_types": ["linear_attention", "full_attention"]}
        | {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
        | {"linear_value_head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        | {"shared_expert_intermediate_size": 16},
        linear=QKVO | {"in_proj_qkvz", "in_proj_ba", "out_proj"},
    ),
}
RECURRENT = {name: replace(row, padded=STATE) for name, row in ROWS_WITH_A_STATE.items()}
TABLE: dict[str, Architecture] = {**ARCHITECTURES, **DENSE, **MORE_MIXTURES, **RECURRENT}


def recurrent(name: str) -> Any:
    """Return a random model with a state whose biases and padding are not zero: both would hide what it reads."""
    model = random_model(RECURRENT[name])
    with torch.no_grad():
        for full, parameter in model.named_parameters():
            if "bias" in full:
                parameter.normal_()
        model.get_input_embeddings().weight[:2].normal_(std=2)
    return model
