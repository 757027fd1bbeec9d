"""The independent reference: one plain PyTorch process, stock transformers and stock PEFT, full logits, no DeepSpeed.

It shares with afina only the names of the examples of each step (their order is afina's to choose) and the start of the
adapters (the same seed and the same PEFT call).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    Trainer,
    get_wsd_schedule,
)

from tests.helpers.new_tokens import enlarge, peft_keys
from trainer.config import TrainConfig
from trainer.methods import attach, trainable_parameters

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def reference_base(folder: str, config: TrainConfig) -> Any:
    """Stock transformers, a multimodal wrapper whole; 8 and 4 bits by bitsandbytes."""
    extra: dict[str, Any] = {}
    if config.method.bits == 8:
        extra["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    if config.method.bits == 4:
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    (saved_as,) = AutoConfig.from_pretrained(folder).architectures
    kind = AutoModelForImageTextToText if saved_as.endswith("ForConditionalGeneration") else AutoModelForCausalLM
    return enlarge(kind.from_pretrained(folder, dtype=torch.float32, **extra), folder, config)


def reference_model(folder: str, config: TrainConfig, total_steps: int = 1, linear: list[str] | str = LINEAR) -> Any:
    """Stock PEFT on it, ``all_linear`` being these names or this regular expression. Of bottleneck adapters, which PEFT
    has none of, only the start is afina's."""
    method = config.method
    if method.name == "bottleneck":
        return PlainBottlenecks(folder, config)
    model = reference_base(folder, config)
    if method.name == "full":
        return model
    common: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    peft: Any
    if method.name == "lora":
        peft = LoraConfig(
            **common,
            r=method.r,
            lora_alpha=method.alpha or 2 * method.r,
            use_dora=method.dora,
            use_rslora=method.rslora,
            target_modules=linear if method.target_modules == "all_linear" else list(method.target_modules),
            target_parameters=EXPERTS if method.target_parameters == "experts" else method.target_parameters,
            **peft_keys(model, folder, config),
        )
    elif method.name == "adalora":
        times = {"tinit": method.tinit, "tfinal": method.tfinal, "deltaT": method.deltaT, "total_step": total_steps}
        ranks = {"init_r": method.init_r, "target_r": method.target_r, "lora_alpha": 2 * method.init_r}
        peft = AdaLoraConfig(
            **common,
            **times,
            **ranks,
            target_modules=linear,
            beta1=method.beta1,
            beta2=method.beta2,
            orth_reg_weight=method.orth_reg_weight,
        )
    elif method.name == "ia3":
        peft = IA3Config(**common, target_modules=linear, feedforward_modules=["down_proj"])
    elif method.name == "prompt":
        kind = "SAMPLE_VOCAB" if method.init == "vocab" else "RANDOM"
        peft = PromptTuningConfig(**common, num_virtual_tokens=method.virtual_tokens, prompt_tuning_init=kind)
    else:
        peft = PrefixTuningConfig(
            **common, num_virtual_tokens=method.virtual_tokens, prefix_projection=method.prefix_projection
        )
    torch.manual_seed(config.run.seed if method.seed is None else method.seed)
    return get_peft_model(model, peft)


class PlainBottlenecks(torch.nn.Module):
    """Two products and a bend behind the output of o_proj and down_proj, written out as hooks."""

    def __init__(self, folder: str, config: TrainConfig) -> None:
        super().__init__()
        self.base = reference_base(folder, config).requires_grad_(False)
        started = trainable_parameters(attach(reference_base(folder, config), config.method, config.run.seed))
        self.parts = {name: torch.nn.Parameter(p.detach().clone()) for name, p in started.items()}
        for name in self.parts:
            if name.endswith(".down.weight"):
                place = name.removesuffix(".down.weight")
                self.base.get_submodule(place).register_forward_hook(partial(self.bend, place))

    def bend(self, place: str, _: Any, __: Any, out: Tensor) -> Tensor:
        down, up = ((self.parts[f"{place}.{k}.weight"], self.parts[f"{place}.{k}.bias"]) for k in ("down", "up"))
        return out + (torch.relu(out @ down[0].T + down[1]) @ up[0].T + up[1])

    def forward(self, **inputs: Any) -> Any:
        return self.base(**inputs)

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        return iter(self.parts.items())


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
    """The trained tensors after ``len(batches)`` AdamW steps."""
    return trained_reference(folder, config, batches, total_steps)[1]


def trained_reference(
    folder: str,
    config: TrainConfig,
    batches: list[list[dict[str, Any]]],
    total_steps: int,
    make: Callable[[str, TrainConfig, int], Any] = reference_model,
) -> tuple[Any, dict[str, Tensor]]:
    """The model and its trained tensors after ``len(batches)`` AdamW steps, cosine schedule with linear warmup."""
    model = make(folder, config, total_steps)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optim = config.optim
    optimizer = reference_optimizer(model, trained, config)
    rates = [group["lr"] for group in optimizer.param_groups]
    model.train()  # bitsandbytes computes otherwise in evaluation mode
    warmup = math.ceil(config.schedule.warmup_ratio * total_steps)
    for step, examples in enumerate(batches):
        share = (step + 1) / warmup if step < warmup else falling_share(config, step, warmup, total_steps)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share
        mean_loss(model, examples).backward()
        if optim.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(trained.values(), optim.max_grad_norm)
        optimizer.step()
        if config.method.name == "adalora":
            model.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
    return model, {name: p.detach().clone() for name, p in trained.items()}


def reference_optimizer(model: Any, trained: dict[str, Any], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over the groups of transformers' Trainer, whose rule it is what decays; for LoRA+ PEFT's own function."""
    optim = config.optim
    common: dict[str, Any] = {"betas": (optim.beta1, optim.beta2), "eps": optim.eps}
    if optim.lora_plus_ratio is not None:
        return create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            lr=optim.learning_rate,
            loraplus_lr_ratio=optim.lora_plus_ratio,
            loraplus_weight_decay=optim.weight_decay,
            **common,
        )
    decaying = set(trained)
    if not optim.decay_biases_and_norms:
        theirs = Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
        plain = isinstance(model, PlainBottlenecks)
        decaying = {name for name in trained if (not name.endswith("bias") if plain else name in theirs)}
    groups = [
        {"params": [p for n, p in trained.items() if n in decaying], "weight_decay": optim.weight_decay},
        {"params": [p for n, p in trained.items() if n not in decaying], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=optim.learning_rate, **common)


def falling_share(config: TrainConfig, step: int, warmup: int, total_steps: int) -> float:
    """What is left of the peak behind the warmup; wsd by transformers."""
    schedule = config.schedule
    if schedule.name == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total_steps - warmup)))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    decay = round(schedule.decay_ratio * total_steps)
    more: dict[str, Any] = {"decay_type": schedule.decay_shape, "min_lr_ratio": schedule.min_ratio}
    made = get_wsd_schedule(optimizer, warmup, decay, total_steps, **more)
    return float(made.lr_lambdas[0](step))


def worst_distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative Frobenius distance over all trained tensors."""
    assert set(found) == set(expected), set(found) ^ set(expected)
    return max(float((found[n] - expected[n]).norm() / expected[n].norm()) for n in expected)
