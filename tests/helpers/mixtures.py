"""Tiny random models of the families whose experts are parameters of three dimensions."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.helpers.architectures import HEADS_OF_8, SIZES

LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
CHOSEN = {"num_experts_per_tok": 2}
# A class of transformers' configs with its keys: 4 experts, of which a token meets 2.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {**SIZES, **CHOSEN, "num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**SIZES, **CHOSEN, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {**HEADS_OF_8, **CHOSEN, "num_experts": 4, "moe_intermediate_size": 16}),
    # Its stacks are (experts, in, out), those of the others (experts, out, in).
    "gpt_oss": ("GptOssConfig", {**HEADS_OF_8, **CHOSEN, "num_local_experts": 4, "sliding_window": 8}),
    # Its first layer has no experts.
    "deepseek_v3": (
        "DeepseekV3Config",
        {**SIZES, **CHOSEN, **LATENT, "num_key_value_heads": 4, "n_routed_experts": 4, "moe_intermediate_size": 16}
        | {"n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "olmoe": ("OlmoeConfig", {**SIZES, **CHOSEN, "num_experts": 4}),
}


def mixture(family: str, **changes: Any) -> Any:
    """Return a random model of a family, some keys of its config changed, the same at each call."""
    name, keys = FAMILIES[family]
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**{**keys, **changes})).eval()
