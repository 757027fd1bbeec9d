"""The table of tiny random multimodal wrappers: a text model, a vision tower and a projector, as in checkpoints."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers

from tests.helpers.architectures import HEADS_OF_8, MLP, QKVO, Architecture

# Ids of tokens that stand for images, counted from the end of the vocabulary: text must not hold them.
IMAGE_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "image_token_index")
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}

# What stands beside the text part is never named in these rows: named sets must not reach it.
WRAPPERS = {
    "gemma3 wrapper": Architecture(
        "Gemma3Config",
        {
            "text_config": {
                **HEADS_OF_8,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "vision_config": {**VISION, "vision_use_head": False},
            "mm_tokens_per_image": 4,
        },
    ),
    "mistral3 wrapper": Architecture(
        "Mistral3Config",
        {
            "text_config": {"model_type": "mistral", **HEADS_OF_8},
            "vision_config": {"model_type": "pixtral", **VISION, "image_size": 16, "head_dim": 8},
            "spatial_merge_size": 2,
        },
    ),
    "qwen2_5_vl wrapper": Architecture(
        "Qwen2_5_VLConfig",
        {
            "text_config": {**HEADS_OF_8, "rope_parameters": MROPE},
            "vision_config": {**QWEN_VISION, "out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 16},
        },
    ),
    "qwen3_vl wrapper": Architecture(
        "Qwen3VLConfig",
        {
            "text_config": {**HEADS_OF_8, "rope_parameters": MROPE},
            "vision_config": {
                **QWEN_VISION,
                "out_hidden_size": 32,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0, 1],
            },
        },
    ),
    "llama4 wrapper": Architecture(
        "Llama4Config",
        {
            "text_config": {
                **HEADS_OF_8,
                "intermediate_size_mlp": 48,
                "num_local_experts": 4,
                "interleave_moe_layer_step": 2,
                "attention_chunk_size": 8,
                "layer_types": ["chunked_attention", "full_attention"],
                "no_rope_layers": [1, 0],
            },
            "vision_config": {
                **VISION,
                "intermediate_size": 64,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
                "vision_output_dim": 16,
            },
        },
    ),
    "qwen3_5 wrapper": Architecture(
        "Qwen3_5Config",
        {
            "text_config": {
                **HEADS_OF_8,
                "layer_types": ["linear_attention", "full_attention"],
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 2,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
                "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0},
            },
            "vision_config": {**QWEN_VISION, "out_hidden_size": 32, "num_position_embeddings": 16},
        },
        linear=QKVO | MLP | {"in_proj_a", "in_proj_b", "in_proj_qkv", "in_proj_z", "out_proj"},
    ),
    "llava wrapper": Architecture(
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **HEADS_OF_8},
            "vision_config": {"model_type": "clip_vision_model", **VISION},
        },
    ),
    "internvl wrapper": Architecture(
        "InternVLConfig",
        {
            "text_config": {"model_type": "qwen2", **HEADS_OF_8},
            "vision_config": {**VISION, "image_size": [8, 8], "patch_size": [4, 4]},
        },
    ),
    "smolvlm wrapper": Architecture(
        "SmolVLMConfig",
        {
            "text_config": {"model_type": "llama", **HEADS_OF_8},
            "vision_config": VISION,
            "scale_factor": 2,
        },
    ),
    "gemma4 wrapper": Architecture(
        "Gemma4Config",
        {
            "text_config": {
                **HEADS_OF_8,
                "global_head_dim": 8,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"],
                "hidden_size_per_layer_input": 4,
                "vocab_size_per_layer_input": 2048,
                "num_kv_shared_layers": 0,
            },
            "vision_config": {**VISION, "head_dim": 8, "global_head_dim": 8},
            "audio_config": None,
        },
        linear=QKVO | MLP | {"per_layer_input_gate", "per_layer_model_projection", "per_layer_projection"},
    ),
}


def tiny_wrapper(name: str, **changes: Any) -> Any:
    """Return a random wrapper, some keys of its text part's config changed, from torch's global generator."""
    row = WRAPPERS[name]
    text = {**row.keys["text_config"], **changes}
    kind = getattr(transformers, row.config)
    known = inspect.signature(kind.__init__).parameters
    image_ids = {key: text["vocab_size"] - number for number, key in enumerate(IMAGE_IDS, 1) if key in known}
    config = kind(**{**row.keys, **image_ids, "text_config": text})
    model = transformers.AutoModelForImageTextToText.from_config(config)
    for full, parameter in model.named_parameters():
        if full.endswith("A_log"):
            parameter.data.fill_(-3.0)  # else a linear attention forgets so fast that nothing depends on how fast
        elif parameter.dim() > 1 and not parameter.any():  # some projectors start at zero
            torch.nn.init.normal_(parameter, std=0.1)
    return model
