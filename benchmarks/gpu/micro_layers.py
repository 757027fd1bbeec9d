"""RMSNorm, a linear layer with LoRA, and the loss: as they are, as they might be, and as others have them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.measure import (
    DEVICE,
    DTYPE,
    IS_CUDA,
    SCALE,
    PeakMemory,
    emit,
    forward_backward,
    median_ms,
    relative_distance,
)
from benchmarks.gpu.variants import applied
from trainer.kernels.label_loss import _cross_entropy, _FrozenHead
from trainer.kernels.rms_norm import RMSNorm

TOKENS, WIDTH, VOCABULARY, LABELS = (size // SCALE for size in (8192, 4096, 128256, 4096))


def norms() -> None:
    """Time RMSNorm and compare each kind with transformers' own in fp32."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, weight = _randn(TOKENS, WIDTH), torch.ones(WIDTH, device=DEVICE, dtype=DTYPE)
    theirs = LlamaRMSNorm(WIDTH, 1e-5).to(DEVICE, DTYPE).requires_grad_(False)
    kinds: dict[str, Callable[[Tensor], Tensor]] = {
        "afina": lambda x: RMSNorm.apply(x, weight, 1e-5),
        "F.rms_norm": lambda x: F.rms_norm(x, (WIDTH,), weight, 1e-5),
        "transformers": theirs,
    }
    if (liger := _liger_rms_norm()) is not None:
        kinds["Liger"] = lambda x: liger(x, weight, 1e-5, 0.0, "llama", False)
    (exact,) = forward_backward(LlamaRMSNorm(WIDTH, 1e-5).to(DEVICE).requires_grad_(False), [x.float()])()
    for name, kind in kinds.items():
        call = forward_backward(kind, [x])
        found = {"forward_ms": median_ms(lambda kind=kind: kind(x)), "both_ms": median_ms(call)}
        emit("micro", "RMSNorm of 8192 x 4096", kind=name, **found, far=relative_distance(call()[0], exact))


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


def _liger_rms_norm() -> Any:
    """Return Liger's RMSNorm; ``None`` where it is not installed or there is no GPU for its Triton kernels."""
    if not IS_CUDA:
        return None
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    except ImportError:
        return None
    return LigerRMSNormFunction.apply


def lora() -> None:
    """Time a linear layer alone, with PEFT's LoRA, and with the product added in place."""
    from peft import LoraConfig, get_peft_model

    what = "linear 4096 x N of 8192 tokens"
    for width in (4096, 14336):
        model = torch.nn.Sequential(torch.nn.Linear(WIDTH, width // SCALE, bias=False)).to(DEVICE, DTYPE)
        base, x = model[0].weight.detach(), _randn(TOKENS, WIDTH)
        alone = forward_backward(partial(F.linear, weight=base), [x])
        emit("micro", what, n=width, kind="base alone", both_ms=median_ms(alone))
        config = LoraConfig(r=16, lora_alpha=40, target_modules=["0"])
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False).to(DTYPE)
        trainable = [p for p in adapted.parameters() if p.requires_grad]
        with torch.no_grad():
            trainable[1].normal_()
        found = {}
        for kind, variant in (("PEFT", ""), ("addmm", "lora")):
            with applied(variant):
                call = _with_parameters(adapted, x, trainable)
                found[kind] = call()
                emit("micro", what, n=width, kind=f"LoRA r=16, {kind}", both_ms=median_ms(call))
        far = max(relative_distance(*pair) for pair in zip(found["addmm"], found["PEFT"], strict=True))
        emit("micro", "LoRA by addmm against PEFT's", n=width, far=far)


def _with_parameters(model: Any, x: Tensor, parameters: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """Return a call of forward and backward that gives the gradients of the input and of the parameters."""
    random = torch.Generator("cpu").manual_seed(1)
    leaf = x.detach().requires_grad_()
    gradient = torch.randn(model(leaf).shape, generator=random).to(DEVICE, DTYPE)
    return lambda: torch.autograd.grad(model(leaf), [leaf, *parameters], gradient)


def loss() -> None:
    """Time the loss of 4096 labels with chunks of three sizes."""
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False, device=DEVICE, dtype=DTYPE).requires_grad_(False)
    hidden = _randn(LABELS, WIDTH)
    target, weight = torch.randint(VOCABULARY, (LABELS,), device=DEVICE), torch.ones(LABELS, device=DEVICE)

    def chunk(hidden: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return _cross_entropy(head(hidden), target, weight)

    def whole(size: int, hidden: Tensor) -> Tensor:
        pieces = zip(hidden.split(size), target.split(size), weight.split(size), strict=True)
        return torch.stack([_FrozenHead.apply(chunk, *piece) for piece in pieces]).sum()

    for elements in (1 << 24, 1 << 26, 1 << 28):
        size, memory = max(1, elements // 128256 // SCALE), PeakMemory()
        both_ms = median_ms(forward_backward(partial(whole, size), [hidden]), 5, 1)
        found = {"chunk_elements": elements, "labels_a_chunk": size, "both_ms": both_ms, "peak_gib": memory.gib()}
        emit("micro", "loss of 4096 labels, 128256 words", **found)
