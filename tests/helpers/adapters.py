"""Adapters of every kind on the tiny Llama: fresh, trained for some steps, saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.helpers.architectures import tiny
from trainer.config.method import METHODS, MethodConfig
from trainer.methods import attach, save_adapter, trainable_parameters
from trainer.methods.initial_weights import copy_initial_weights

ADALORA: dict[str, Any] = METHODS["adalora"].needs
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "lora, biases": {"r": 4, "bias": "lora_only"},
    "lora, two layers": {"r": 4, "layers": [1]},
    "lora, patterns": {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3.0}},
    "rslora": {"r": 4, "rslora": True, "alpha": 3.0},
    "dora": {"r": 4, "dora": True},
    "gaussian": {"r": 4, "init": "gaussian"},
    "orthogonal": {"r": 4, "init": "orthogonal"},
    "pissa": {"r": 4, "init": "pissa"},
    "pissa, rslora": {"r": 4, "init": "pissa", "rslora": True},
    "olora": {"r": 4, "init": "olora"},
    "adalora": {"name": "adalora", **ADALORA, "init_r": 6, "target_r": 3},
    "ia3": {"name": "ia3"},
    "ia3, one layer": {"name": "ia3", "layers": [0], "target_modules": ["k_proj", "v_proj", "down_proj"]},
    "prompt": {"name": "prompt", "virtual_tokens": 3},
    "prompt, vocabulary": {"name": "prompt", "virtual_tokens": 3, "init": "vocab"},
    "prefix": {"name": "prefix", "virtual_tokens": 3, "prefix_projection": False},
    "prefix, zero": {"name": "prefix", "virtual_tokens": 3, "prefix_projection": False, "init": "zero"},
    "prefix, projected": {"name": "prefix", "virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 7},
    "bottleneck": {"name": "bottleneck", "reduction_factor": 4, "placement": "houlsby", "activation": "relu"},
    "bottleneck, pfeiffer": {
        "name": "bottleneck",
        "reduction_factor": 3,
        "placement": "pfeiffer",
        "activation": "gelu",
        "layers": [1],
    },
}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


def base() -> Any:
    torch.manual_seed(1)
    return tiny("llama").eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits[:, -IDS.shape[1] :]


def trained_model(kind: MethodConfig) -> tuple[Any, dict[str, Tensor]]:
    """A model some steps after its start, and the initial weights that its adapters took out of the base."""
    model = attach(base(), kind, seed=0, total_steps=10)
    start = copy_initial_weights(model, kind)
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-2)
    for _ in range(3):
        out = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits
        torch.nn.functional.cross_entropy(out[:, -len(IDS[0]) :].flatten(0, 1), IDS.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, start


def adalora_model(total_steps: int = 10, **keys: Any) -> Any:
    kind = MethodConfig(**{**KINDS["adalora"], "target_modules": ["q_proj", "v_proj"], **keys})
    return attach(base(), kind, seed=0, total_steps=total_steps)


def save_trained(folder: Path, kind: MethodConfig) -> Path:
    """Save the adapter of a trained model in ``folder``."""
    model, start = trained_model(kind)
    save_adapter(model, folder, {n: p.detach() for n, p in trainable_parameters(model).items()}, start)
    return folder
