"""Check the ``model`` group."""

from __future__ import annotations

from typing import Any

from trainer.config.messages import as_typed, config_error, listing, nearest
from trainer.config.schema import GRADIENT_CHECKPOINTING, KERNELS, TrainConfig


def check_model(config: TrainConfig) -> None:
    """Raise a :class:`ConfigError` for the first rule that the group breaks."""
    model = config.model
    if not model.name_or_path.strip():
        raise config_error("model.name_or_path", repr(model.name_or_path), "must not be empty", "model=smollm2_135m")
    if model.dtype == "fp32" and model.attention == "flash_attention_2":
        reason = "flash attention computes in 16 bits, and model.dtype is fp32"
        raise config_error("model.attention", model.attention, reason, "model.attention=sdpa or model.dtype=bf16")
    if model.dtype == "fp16" and config.zero.stage == 0:
        reason = "fp16 needs a loss scaler, which DeepSpeed has in ZeRO stage 1 and up; zero.stage is 0"
        raise config_error("model.dtype", model.dtype, reason, "zero=stage1 or model.dtype=bf16")
    _gradient_checkpointing(model.gradient_checkpointing)
    _kernels(model.kernels)
    if model.compile and config.zero.stage == 3:
        reason = "ZeRO-3 gathers weights between the modules of a layer, and a compiled layer has none"
        raise config_error("model.compile", True, reason, "zero=stage2 or model.compile=false")
    if model.compile and config.method.target_parameters is not None:
        reason = (
            "adapters on parameters (method.target_parameters) are put on and off in each forward, and compiled again"
        )
        raise config_error("model.compile", True, reason, "model.compile=false or method.target_parameters=null")


def _gradient_checkpointing(value: Any) -> None:
    if isinstance(value, bool) or value == "selective":
        return
    name = "model.gradient_checkpointing"
    near = nearest(value, ("false", "true", "selective")) if isinstance(value, str) else None
    raise config_error(name, value, f"must be {listing(GRADIENT_CHECKPOINTING)}", f"{name}={near or 'false'}")


def _kernels(value: Any) -> None:
    if value in ("auto", "none"):
        return
    wrong = [each for each in value if each not in KERNELS] if isinstance(value, list) else [value]
    if not isinstance(value, list) or not value or wrong:
        near = nearest(str(wrong[0]), ("auto", "none", *KERNELS)) if wrong else None
        hint = as_typed("model.kernels", [near] if near in KERNELS else near or "auto")
        raise config_error("model.kernels", value, f"must be auto, none, or a list of {listing(KERNELS)}", hint)
