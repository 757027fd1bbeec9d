"""Say what a run is going to do, on one screen: what is trained, on what, how."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.config import TrainConfig
from trainer.config.messages import in_grammar
from trainer.config.method import METHODS, default_alpha
from trainer.config.optimizers import OPTIMIZERS
from trainer.config.rules.targets import TARGET_SETS
from trainer.config.schema import ScheduleConfig
from trainer.config.taken import default_values
from trainer.data.describe import describe
from trainer.data.run_data import Data
from trainer.data.step_batches import StepSource
from trainer.engine.learning_rate import decay_steps, peak_learning_rate, warmup_steps
from trainer.tracking.result import size_text

SHOWN_TARGETS = 8
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}  # as model.dtype calls them

logger = logging.getLogger(__name__)


def log_start(
    config: TrainConfig, data: Data, model_info: dict[str, Any], folder: Path, first_step: int, source: StepSource
) -> None:
    """Log what the run is going to do. On rank 0.

    Args:
        config: the whole configuration.
        data: the prepared rows.
        model_info: ``Built.model_info``.
        folder: the run folder.
        first_step: that it is resumed after; 0 at a start.
        source: of the batches: how much of the first step's rows is shared is told.
    """
    for line in start_lines(config, data, model_info):
        logger.info(line)
    if first_step < data.total_steps(config.batch):
        useful, computed = source.count_tokens(first_step)
        logger.info(f"a step: {useful:,} tokens of rows, {computed:,} computed ({useful / computed:.2f} x), at first")
    logger.info(f"run: {folder}" + (f", resumed after step {first_step}" if first_step else ""))


def values_taken(
    config: TrainConfig, model_info: dict[str, Any], total_steps: int, decays_all: bool = False
) -> dict[str, Any]:
    """Return ``{dotted key: value}`` of what null, auto and short names stand for in this run."""
    taken = default_values(config)
    if config.optim.weight_decay and config.optim.decay_biases_and_norms is None:
        taken["optim.decay_biases_and_norms"] = decays_all
    if config.schedule.warmup_steps is None:
        taken["schedule.warmup_steps"] = warmup_steps(config.schedule, total_steps)
    if config.batch.max_steps is None:
        taken["batch.max_steps"] = total_steps
    if config.model.dtype == "auto":
        taken["model.dtype"] = DTYPES[model_info["dtype"]]
    if config.batch.packing == "auto":
        taken["batch.packing"] = model_info["packing_taken"]
    if config.model.kernels == "auto":
        taken["model.kernels"] = model_info["kernels_taken"] or "none"
    if config.method.target_modules in TARGET_SETS and model_info["targets"]:
        taken["method.target_modules"] = model_info["targets"]
    return taken


def start_lines(config: TrainConfig, data: Data, model_info: dict[str, Any]) -> list[str]:
    """Describe a run before its first step.

    Args:
        config: the whole configuration.
        data: the prepared rows.
        model_info: ``Built.model_info``.
    """
    info = model_info
    lines = [
        *describe(data, config),
        f"model: {config.model.name_or_path} in {info['dtype']} on {info['world_size']} × {info['device']}, "
        f"ZeRO stage {config.zero.stage}, gradient checkpointing {str(config.model.gradient_checkpointing).lower()}; "
        f"trained {info['trainable_parameters']:,} of {info['total_parameters']:,} parameters "
        f"({info['trainable_percent']:.2f} %)",
        f"method: {', '.join(_method(config, info['targets']))}",
        f"optimizer: {', '.join(_optimizer(config, data.total_steps(config.batch)))}",
        f"memory: {size_text(info['state_bytes'])} a device for weights, gradients and optimizer; "
        "activations come on top",
        f"peak of a device: {info['peak_flops'] / 1e12:.4g} TFLOP/s in {info['dtype']} ({info['peak_flops_source']})",
    ]
    extra = [info[key] for key in ("frozen_parts", "left_out", "experts") if info[key] is not None]
    return [*lines, *extra, info["packing"], *info["kernels"]]


def _method(config: TrainConfig, targets: list[str]) -> Iterator[str]:
    """Name the method and those of its keys that have a value."""
    method = config.method
    yield METHODS[method.name].title
    rank = method.r if method.name == "lora" else method.init_r if method.name == "adalora" else None
    if rank is not None:
        shown = {"lora": "r", "adalora": "init_r"}[method.name]
        yield f"{shown}={rank}"
        yield f"alpha={default_alpha(rank)} (2 * {shown})" if method.alpha is None else f"alpha={method.alpha:g}"
        if method.name == "adalora":
            yield f"target_r={method.target_r}"
    for name in ("virtual_tokens", "reduction_factor", "placement"):
        if (value := getattr(method, name)) is not None:
            yield f"{name}={value}"
    flags = [name for name in ("rslora", "dora") if getattr(method, name)]
    yield from flags
    if method.trainable_tokens is not None:
        which = method.trainable_tokens if isinstance(method.trainable_tokens, list) else config.model.new_tokens
        yield f"embeddings of {len(which)} token{'s' if len(which) > 1 else ''}"
    if method.modules_to_save is not None:
        yield f"{' and '.join(method.modules_to_save)} whole"
    if method.dropout:
        yield f"dropout={method.dropout:g}"
    if config.model.neftune_alpha is not None:
        yield f"noise on embeddings (NEFTune, alpha={config.model.neftune_alpha:g})"
    if method.bits < 16:
        kind = f" ({method.quant_type})" if method.bits == 4 else ""
        yield f"base in {method.bits} bits{kind}"
    if method.adapter:
        yield f"from {method.adapter}"
    if targets:
        more = f" and {len(targets) - SHOWN_TARGETS} more" if len(targets) > SHOWN_TARGETS else ""
        yield f"on {' '.join(targets[:SHOWN_TARGETS])}{more}"
    if method.target_parameters is not None:
        yield f"on parameters {in_grammar(method.target_parameters)}"


def _optimizer(config: TrainConfig, total_steps: int) -> Iterator[str]:
    """Name the rate and where it comes from, its schedule, decay and clipping."""
    optim, schedule = config.optim, config.schedule
    kind = OPTIMIZERS[optim.name]
    share = "" if kind.rate_factor == 1 else f"{kind.rate_factor:g} of "
    source = f"{share}{METHODS[config.method.name].title}'s default" if optim.learning_rate is None else "as given"
    yield f"{kind.title}, learning rate {peak_learning_rate(config):g} ({source})"
    yield _schedule(schedule, total_steps)
    if optim.lora_plus_ratio is not None:
        yield f"of B {optim.lora_plus_ratio:g} times that (LoRA+)"
    yield f"weight decay {optim.weight_decay:g}"
    yield f"gradient norm clipped at {optim.max_grad_norm:g}" if optim.max_grad_norm else "gradient norm not clipped"


def _schedule(schedule: ScheduleConfig, total_steps: int) -> str:
    """Name the shape of the rate, and what it falls to where that is not 0."""
    shape = f"{schedule.name} after {warmup_steps(schedule, total_steps)} warm-up steps"
    if schedule.name == "wsd":
        shape += f" (falling in the last {decay_steps(schedule, total_steps)}: {schedule.decay_shape})"
    return shape + (f" to {schedule.min_ratio:g} of the rate" if schedule.min_ratio else "")
