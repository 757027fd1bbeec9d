"""The independent reference: one plain PyTorch process, stock transformers and stock PEFT, full logits, no DeepSpeed.

It shares with afina only the names of the examples of each step (their order is afina's to choose) and the start of the
adapters (the same seed and the same PEFT call).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from trainer.config import TrainConfig


def reference_model(folder: str, config: TrainConfig) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if config.method.name == "full":
        return model
    torch.manual_seed(config.run.seed)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(task_type="CAUSAL_LM", r=config.method.r, lora_alpha=2 * config.method.r, target_modules=names)
    return get_peft_model(model, lora)


def mean_loss(model: Any, examples: list[dict[str, Any]]) -> Tensor:
    """Cross-entropy a label token over the whole batch, by transformers' own shifted loss on padded rows."""
    width = max(len(e["input_ids"]) for e in examples)
    ids = torch.tensor([e["input_ids"] + [0] * (width - len(e["input_ids"])) for e in examples])
    mask = torch.tensor([[1] * len(e["input_ids"]) + [0] * (width - len(e["input_ids"])) for e in examples])
    labels = torch.full_like(ids, -100)
    for row, example in enumerate(examples):
        begin, end = example["prompt_length"], len(example["input_ids"])
        labels[row, begin:end] = ids[row, begin:end]
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss


def train_reference(
    folder: str, config: TrainConfig, batches: list[list[dict[str, Any]]], total_steps: int
) -> dict[str, Tensor]:
    """The trained tensors after ``len(batches)`` AdamW steps, cosine schedule with linear warmup."""
    model = reference_model(folder, config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(), lr=1.0, betas=(0.9, 0.999), eps=config.optim.eps, weight_decay=config.optim.weight_decay
    )
    warmup = math.ceil(config.schedule.warmup_ratio * total_steps)
    for step, examples in enumerate(batches):
        rate = config.optim.learning_rate
        if step < warmup:
            rate *= (step + 1) / warmup
        else:
            rate *= 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total_steps - warmup)))
        optimizer.param_groups[0]["lr"] = rate
        mean_loss(model, examples).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), config.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in trained.items()}


def worst_distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative Frobenius distance over all trained tensors."""
    assert set(found) == set(expected), set(found) ^ set(expected)
    return max(float((found[n] - expected[n]).norm() / expected[n].norm()) for n in expected)
