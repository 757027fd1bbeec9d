"""Translate the typed configuration into DeepSpeed's terms."""

from __future__ import annotations

from typing import Any

import torch

from trainer.config.schema import TrainConfig

PERSISTENT_ELEMENTS = 100_000  # DeepSpeed's own stage3_param_persistence_threshold


def deepspeed_config(
    config: TrainConfig,
    dtype: torch.dtype,
    world_size: int,
    largest_adapter: int = 0,
    *,
    checks_gradients: bool = True,
) -> dict[str, Any]:
    """Translate the typed configuration into DeepSpeed's terms (mixed precision too), with ``zero.extra`` merged last.

    DeepSpeed's batch arithmetic is told 1 everywhere: the loss is already divided by the label tokens of the global
    batch, and each step says itself when it ends.

    Args:
        config: the whole configuration.
        dtype: of forward and backward.
        world_size: number of ranks.
        largest_adapter: elements of the largest tensor of an adapter; 0 when all weights are trained. ZeRO-3 keeps
            tensors up to this size whole on every rank, instead of gathering each at each use.
        checks_gradients: of bf16, tensor by tensor before each update; False where they were checked already.
    """
    stage = config.zero.stage
    zero: dict[str, Any] = {"stage": stage}
    if config.zero.offload_optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.zero.offload_params == "cpu":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if stage == 3 and largest_adapter > PERSISTENT_ELEMENTS:
        zero["stage3_param_persistence_threshold"] = largest_adapter
    out: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world_size,
        "gradient_clipping": config.optim.max_grad_norm if stage else 0.0,  # stage 0 is clipped in Engine.update
        "zero_optimization": zero,
        # torch's AdamW under ZeRO, offloaded too: the same arithmetic at every stage, and no C++ compiler needed
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device in every forward
    }
    if stage and dtype == torch.bfloat16:
        out["bf16"] = {"enabled": True, "check_grad_overflow": checks_gradients}
    if stage and dtype == torch.float16:
        out["fp16"] = {"enabled": True}
    return _merge(out, config.zero.extra)


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], value) if both else value
    return merged
