"""Load base models and tokenizers: dense, in 8 bits or in 4, in the dtype of mixed precision, with the trie kernel."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from trainer.compat.bitsandbytes import keep_4bit_layout
from trainer.compat.hub import hub_obstacle, was_not_reached
from trainer.compat.torch import cpu_multiplies_bf16, cpu_multiplies_fp16
from trainer.compat.transformers import attention_name
from trainer.config.method import MethodConfig
from trainer.config.new_tokens import new_tokens
from trainer.config.schema import ModelConfig
from trainer.errors import ConfigError, ModelError
from trainer.kernels.selective_checkpoint import checkpoint_arguments, keep_linears
from trainer.kernels.trie_attention import KERNEL, register
from trainer.models.hub import is_hub_model, model_error, tell_of_cache
from trainer.models.model_class import loader_class
from trainer.models.new_tokens import add_tokens, enlarge_embeddings
from trainer.tracking.counter import ProgressCounter

logger = logging.getLogger(__name__)
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compute_dtype(name: str, device: torch.device, zero_stage: int) -> torch.dtype:
    """Choose the dtype of forward and backward: of mixed precision in bf16 or fp16, or fp32 throughout.

    Under mixed precision the optimizer still steps in fp32: ZeRO 1 to 3 keep fp32 masters of the 16-bit weights, and
    under stage 0 what is trained is fp32 itself, with autocast.

    Args:
        name: ``model.dtype``; ``auto`` is bf16 where the hardware multiplies it, else fp16 on GPU and fp32 on CPU.
        device: where the model will run.
        zero_stage: fp16 needs DeepSpeed's loss scaler, which lives in its ZeRO optimizers.

    Raises:
        ConfigError: fp16 without a loss scaler, or on a CPU that has no fp16 arithmetic.
    """
    if name == "auto":
        if device.type == "cuda":
            dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        else:
            dtype = torch.bfloat16 if cpu_multiplies_bf16() else torch.float32
    else:
        dtype = DTYPES[name]
    if dtype == torch.float16 and zero_stage == 0:
        raise ConfigError(
            "zero.stage",
            value=0,
            reason="has no loss scaler, which fp16 needs",
            hint="zero=stage1, or model.dtype=fp32",
        )
    if dtype == torch.float16 and device.type == "cpu" and not cpu_multiplies_fp16():
        raise ConfigError(
            "model.dtype", value="fp16", reason="this CPU has no fp16 arithmetic", hint="model.dtype=fp32"
        )
    return dtype


def load_tokenizer(folder: str, model: ModelConfig) -> Any:
    """Load the model's tokenizer, with ``model.new_tokens``; padding falls back to the end token, which is safe because
    labels go by position.

    Raises:
        ModelError: it cannot be found or read.
        ConfigError: a new token is one of its own already.
    """
    from transformers import AutoTokenizer

    if model.trust_remote_code:
        _tell_of_remote_code(folder)
    is_hub = _look_for_hub(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _not_loadable(folder, error) from error
    if is_hub:
        tell_of_cache(folder)
    add_tokens(tokenizer, new_tokens(model))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _look_for_hub(folder: str) -> bool:
    """Return whether a model is asked of the hub; where that cannot be reached, the libraries are set offline."""
    is_hub = is_hub_model(folder)
    if is_hub:
        hub_obstacle()
    return is_hub


@cache
def _tell_of_remote_code(folder: str) -> None:
    logger.warning(f"model.trust_remote_code: Python code that comes with {folder} is run")


def load_model(
    folder: str,
    model: ModelConfig,
    method: MethodConfig,
    dtype: torch.dtype,
    device: torch.device,
    zero_stage: int,
    device_map: str | None = None,
) -> nn.Module:
    """Load the base model: onto the device where it fits whole, onto the CPU for ZeRO-3, which partitions it.

    A multimodal checkpoint is loaded whole, by its wrapper's own class; bits hold for its towers too.

    Args:
        folder: a local folder or hub id (``embedded.resolve`` has been applied).
        model: the ``model`` group; its new tokens get their rows.
        method: the ``method`` group: its ``bits`` and quantisation.
        dtype: of weights and arithmetic.
        device: of this rank.
        zero_stage: under 3, 4-bit weights are stored as ``dtype`` so that DeepSpeed can partition them.
        device_map: transformers' own placement, for inference on several devices.

    Raises:
        ModelError: it cannot be found, read or quantised.
    """
    extra: dict[str, Any] = {}
    if model.attention != "auto":
        extra["attn_implementation"] = model.attention
    if method.bits < 16:
        extra["quantization_config"] = quantization_config(method, dtype, zero_stage)
    if method.bits < 16 or (device.type == "cuda" and zero_stage < 3):
        extra["device_map"] = {"": str(device)}  # tensor by tensor: no rank holds a copy in host memory
    if device_map is not None:
        extra["device_map"] = device_map
    if model.trust_remote_code:
        _tell_of_remote_code(folder)
    if any(Path(folder).glob("*.bin")) and not any(Path(folder).glob("*.safetensors")):
        logger.info(f"{folder}: the weights are pickles, read as data: what asks for more is refused")
    _look_for_hub(folder)
    try:
        with _counted(folder):
            loaded = loader_class(folder, model.revision, model.trust_remote_code).from_pretrained(
                folder,
                revision=model.revision,
                trust_remote_code=model.trust_remote_code,
                dtype=dtype,
                **extra,
            )
    except (OSError, ValueError, ImportError, UnpicklingError) as error:
        raise _not_loadable(folder, error) from error
    loaded.config.get_text_config().use_cache = False
    _enlarge(loaded, folder, model)
    keep_4bit_layout(loaded)
    if (head := loaded.get_output_embeddings()) is not None:
        head.register_forward_pre_hook(_make_input_contiguous)
    if model.attention in ("auto", "sdpa"):
        use_trie_kernel(loaded)
    if model.gradient_checkpointing:
        _checkpoint_gradients(loaded, selective=model.gradient_checkpointing == "selective")
    return loaded


def _enlarge(loaded: nn.Module, folder: str, model: ModelConfig) -> None:
    """Give the new tokens their rows, by the base's own tokenizer."""
    if model.new_tokens:
        enlarge_embeddings(loaded, load_tokenizer(folder, replace(model, new_tokens=None)), new_tokens(model))


@contextlib.contextmanager
def _counted(folder: str) -> Iterator[None]:
    """Count the tensors that transformers loads inside, in the place of its own bar."""
    from transformers.utils.logging import set_tqdm_hook

    name = Path(folder).name if Path(folder).is_dir() else folder
    with ProgressCounter(f"loading {name}", unit="tensors") as counter:

        def count(factory: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
            is_weights = options.get("desc") == "Loading weights" and len(args) == 1
            return counter.over(args[0], len(args[0])) if is_weights else factory(*args, **options)

        before = set_tqdm_hook(count)
        try:
            yield
        finally:
            set_tqdm_hook(before)


def _checkpoint_gradients(model: Any, selective: bool) -> None:
    if selective and not keep_linears(model):
        raise ConfigError(
            "model.gradient_checkpointing",
            value="selective",
            reason="it keeps the results of dense linear layers, and this model has none (quantised are not dense)",
            hint="model.gradient_checkpointing=true",
        )
    model.gradient_checkpointing_enable(checkpoint_arguments(selective))


def _make_input_contiguous(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copy the output layer's input where it has gaps, as in generation: a slice of the last positions.

    torch would copy the whole vocabulary matrix for each row of it: most of the time of a prefill of 32 rows on CPU,
    and gigabytes."""
    return (args[0].contiguous(), *args[1:]) if args else args


def use_trie_kernel(model: Any) -> None:
    """Set the model's attention to the trie kernel, SDPA outside of a trie, where its architecture can.

    A model whose authors want no SDPA (soft-capped scores, attention sinks) keeps the kernel that they chose.
    """
    register()
    if attention_name(model) != "sdpa":
        return
    with contextlib.suppress(ValueError, NotImplementedError):
        model.set_attn_implementation(KERNEL)


def quantization_config(method: MethodConfig, dtype: torch.dtype, zero_stage: int) -> Any:
    """Build bitsandbytes' configuration: LLM.int8 (Dettmers et al., 2022) or 4 bits (QLoRA, Dettmers et al., 2023)."""
    from transformers import BitsAndBytesConfig

    if method.bits == 8:
        # A threshold above 0 makes a row's result depend on the outliers of its neighbours in the batch.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=method.quant_type,
        bnb_4bit_use_double_quant=method.double_quant,
        bnb_4bit_compute_dtype=DTYPES.get(method.compute_dtype, dtype),
        bnb_4bit_quant_storage=_quant_storage_dtype(method.quant_storage, dtype, zero_stage),
    )


def _quant_storage_dtype(wanted: str, dtype: torch.dtype, zero_stage: int) -> torch.dtype:
    if wanted == "auto":
        return dtype if zero_stage == 3 else torch.uint8
    return torch.uint8 if wanted == "uint8" else DTYPES[wanted]


def _not_loadable(folder: str, error: Exception) -> ModelError:
    if is_hub_model(folder) and was_not_reached(error):
        return model_error(folder)
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    hint = "check the folder" if Path(folder).is_dir() else "check the name, log in to the hub, or name a local folder"
    if "attention implementation" in reason:
        hint = "model.attention=auto takes what this model has"
    return ModelError("model.name_or_path", value=folder, reason=f"cannot be loaded ({reason})", hint=hint)
