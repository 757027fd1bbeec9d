"""Choose the kernels of a run by device and dtype, put them into the model, and take them out again.

The one place that decides which kernel runs where:

=========  ============================================  =================================================
kernel     what it replaces                              ``model.kernels=auto`` takes it
=========  ============================================  =================================================
varlen     attention in masked SDPA calls                on CUDA in 16 bits
lora       PEFT's LoRA layers                            on CUDA
swiglu     the gated SiLU of the MLP                     on CUDA, where liger-kernel is installed
rope       the rotary embedding                          on CUDA, where liger-kernel is installed
rms_norm   RMSNorm written out in fp32                   everywhere (on CUDA it is torch's own fused one)
=========  ============================================  =================================================

Without varlen, attention on CPU and the SDPA of other devices are chosen in ``trie_attention``. Whatever is chosen is
verified on the loaded model before it trains (``verify_kernels``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from trainer.compat.transformers import attention_name
from trainer.config.schema import KERNELS, TrainConfig
from trainer.errors import ConfigError
from trainer.kernels.liger import liger_obstacle, patch_rope, patch_swiglu
from trainer.kernels.lora_linear import patch_lora_linears
from trainer.kernels.patch import Patch
from trainer.kernels.rms_norm import patch_rms_norms
from trainer.kernels.trie_attention import KERNEL
from trainer.kernels.varlen_attention import HALF
from trainer.methods import is_prompt_learning
from trainer.models.compile import compile_layers


def _mark_only(_: Any) -> Patch:
    """Patch nothing: the layout of the micro-batches asks for varlen."""
    return Patch(lambda: None, lambda: None)


INSTALL: dict[str, Callable[[Any], Patch | None]] = {
    "varlen": _mark_only,
    "lora": patch_lora_linears,
    "swiglu": patch_swiglu,
    "rope": patch_rope,
    "rms_norm": patch_rms_norms,
    "compile": compile_layers,
}


class KernelSet:
    """The kernels that one model uses.

    Args:
        model: with its adapters attached, before DeepSpeed.
        names: of the kernels to install; one that finds nothing to replace is not in use.
    """

    def __init__(self, model: Any, names: tuple[str, ...] = ()) -> None:
        self._in_use: dict[str, Patch] = {}
        self._left_out: dict[str, Patch] = {}
        for name in names:
            if (patch := INSTALL[name](model)) is not None:
                self._in_use[name] = patch

    @property
    def names(self) -> tuple[str, ...]:
        """The kernels in use."""
        return tuple(name for name in INSTALL if name in self._in_use)

    def remove(self, *names: str) -> None:
        """Take kernels out."""
        for name in names:
            self._left_out[name] = self._in_use.pop(name)
            self._left_out[name].undo()

    def put_back(self, *names: str) -> None:
        """Put kernels in again that were taken out."""
        for name in names:
            self._in_use[name] = self._left_out.pop(name)
            self._in_use[name].apply()

    def use(self, names: tuple[str, ...]) -> None:
        """Use these of the installed kernels and no others."""
        self.remove(*(name for name in self.names if name not in names))
        self.put_back(*(name for name in names if name in self._left_out))

    @contextlib.contextmanager
    def without(self, *names: str) -> Iterator[None]:
        """Take kernels out inside the ``with`` block."""
        self.remove(*names)
        try:
            yield
        finally:
            self.put_back(*names)


def wanted_kernels(config: TrainConfig, model: Any, device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Return the names of the kernels that ``model.kernels`` and ``model.compile`` mean for this model.

    Args:
        config: the whole configuration.
        model: with its adapters attached.
        device: where it will run.
        dtype: of its forward and backward.

    Raises:
        ConfigError: a kernel was named that this device or model cannot run.
    """
    asked = config.model.kernels
    compiled = ("compile",) if config.model.compile else ()
    if asked == "none":
        return compiled
    find_obstacle = partial(_obstacle, model, device, dtype)
    if asked != "auto":
        for name in asked:
            if (reason := find_obstacle(name)) is not None:
                raise ConfigError(
                    "model.kernels", value=name, reason=f"cannot be used: {reason}", hint="model.kernels=auto"
                )
        return (*asked, *compiled)
    candidates = KERNELS if device.type == "cuda" else ("rms_norm",)
    if dtype not in HALF:
        candidates = tuple(name for name in candidates if name != "varlen")
    return (*(name for name in candidates if find_obstacle(name) is None), *compiled)


def _obstacle(model: Any, device: torch.device, dtype: torch.dtype, name: str) -> str | None:
    """Return why this kernel cannot run here at all; ``None`` when it may be tried."""
    if name == "varlen":
        if attention_name(model) != KERNEL:
            return f"attention is {attention_name(model)}"
        if is_prompt_learning(model):
            return "virtual tokens stand before every row"
        text = model.config.get_text_config()
        if any(getattr(text, key, 0) for key in ("attention_dropout", "attn_pdrop")):
            return "the model drops attention probabilities out"
    if name in ("swiglu", "rope"):
        if device.type != "cuda":
            return "liger-kernel runs on CUDA"
        return liger_obstacle()
    return None


def limit_sdpa(device: torch.device) -> None:
    """Keep SDPA from cuDNN on CUDA: it builds a plan for each new shape, and no two tries have the same."""
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
