"""RMSNorm, LoRA, the MLP, the rotary embedding and the loss: afina's beside transformers' and PEFT's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
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
from trainer.data.batching.micro_batch import Tokens, collate_padded
from trainer.kernels.label_loss import CHUNK_ELEMENTS, CUDA_CHUNK_ELEMENTS, LabelLoss
from trainer.kernels.liger import liger_obstacle, patch_rope, patch_swiglu
from trainer.kernels.lora_linear import patch_lora_linears
from trainer.kernels.rms_norm import RMSNorm, rms_norm

FULL_SIZES = (8192, 4096, 14336, 128256, 4096)
TOKENS, WIDTH, INNER, VOCABULARY, LABELS = (size // SCALE for size in FULL_SIZES)


def norms() -> None:
    """Time RMSNorm and compare each kind with transformers' own in fp32."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, weight = _randn(TOKENS, WIDTH), torch.ones(WIDTH, device=DEVICE, dtype=DTYPE)
    kinds: dict[str, Callable[[Tensor], Tensor]] = {
        "rms_norm": lambda x: rms_norm(x, weight, 1e-5),
        "RMSNorm, written out": lambda x: RMSNorm.apply(x, weight, 1e-5),
        "transformers": LlamaRMSNorm(WIDTH, 1e-5).to(DEVICE, DTYPE).requires_grad_(False),
    }
    (exact,) = forward_backward(LlamaRMSNorm(WIDTH, 1e-5).to(DEVICE).requires_grad_(False), [x.float()])()
    for name, kind in kinds.items():
        emit("micro", "RMSNorm of 8192 x 4096", kind=name, **_times(kind, [x], exact))


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


def _times(function: Callable[..., Tensor], inputs: list[Tensor], exact: Tensor) -> dict[str, float]:
    """Return the times of forward and backward, and how far the first input's gradient is from the exact one."""
    call = forward_backward(function, inputs)
    times = {"forward_ms": median_ms(lambda: function(*inputs)), "both_ms": median_ms(call)}
    return {**times, "far": relative_distance(call()[0], exact)}


def lora() -> None:
    """Time a linear layer alone, with PEFT's LoRA, and with afina's."""
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
        call = _with_parameters(adapted, x, trainable)
        expected = call()
        emit("micro", what, n=width, kind="LoRA r=16, PEFT", both_ms=median_ms(call))
        assert patch_lora_linears(adapted) is not None
        far = max(relative_distance(*pair) for pair in zip(call(), expected, strict=True))
        emit("micro", what, n=width, kind="LoRA r=16, afina", both_ms=median_ms(call), far_from_peft=far)


def _with_parameters(model: Any, x: Tensor, parameters: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """Return a call of forward and backward that gives the gradients of the input and of the parameters."""
    random = torch.Generator("cpu").manual_seed(1)
    leaf = x.detach().requires_grad_()
    gradient = torch.randn(model(leaf).shape, generator=random).to(DEVICE, DTYPE)
    return lambda: torch.autograd.grad(model(leaf), [leaf, *parameters], gradient)


def swiglu() -> None:
    """Time an MLP with a gated SiLU, and with Liger's where that runs."""
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    what, config = "MLP 4096 x 14336 of 8192 tokens", LlamaConfig(hidden_size=WIDTH, intermediate_size=INNER)
    mlp, x = LlamaMLP(config).to(DEVICE, DTYPE).requires_grad_(False), _randn(TOKENS, WIDTH)
    (exact,) = forward_backward(mlp, [x])()
    emit("micro", what, kind="transformers", **_times(mlp, [x], exact))
    if _runs_liger(what):
        assert patch_swiglu(mlp) is not None
        emit("micro", what, kind="Liger", **_times(mlp, [x], exact))


def rope() -> None:
    """Time the rotary embedding of one layer, and Liger's where that runs; queries and keys are copied in both."""
    from transformers.models.llama import modeling_llama

    what, width = "rotary embedding, 32/8 heads of 128, 8192 tokens, and a copy", 128
    q, k = (_randn(1, TOKENS, heads, width).transpose(1, 2) for heads in (32, 8))
    angles = torch.rand(1, TOKENS, width // 2, device=DEVICE).repeat(1, 1, 2)
    cos, sin = angles.cos().to(DTYPE), angles.sin().to(DTYPE)

    def turn(q: Tensor, k: Tensor) -> Tensor:
        # Liger's writes over its input, and in the backward over the gradient, which the product makes afresh
        turned = modeling_llama.apply_rotary_pos_emb(q.clone(), k.clone(), cos, sin)
        return torch.cat([t.flatten() for t in turned]) * 1.0

    exact = forward_backward(turn, [q, k])()[0]
    emit("micro", what, kind="transformers", **_times(turn, [q, k], exact))
    if _runs_liger(what):
        model = modeling_llama.LlamaRotaryEmbedding(modeling_llama.LlamaConfig())
        patch = patch_rope(model)
        assert patch is not None
        try:
            emit("micro", what, kind="Liger", **_times(turn, [q, k], exact))
        finally:
            patch.undo()


def _runs_liger(what: str) -> bool:
    """Return whether Liger's kernels can be tried; say so where not."""
    obstacle = liger_obstacle() if IS_CUDA else "liger-kernel runs on CUDA"
    if obstacle is not None:
        emit("micro", what, kind="Liger", not_run=obstacle)
    return obstacle is None


def loss() -> None:
    """Time the loss of 4096 labels, over a model that is an embedding, a norm and an output layer, by chunks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=0, dtype=DTYPE, tie_word_embeddings=False
    )
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config).to(DTYPE).requires_grad_(False)
    weight = model.model.norm.weight.requires_grad_()
    ids = np.random.default_rng(0).integers(0, VOCABULARY, LABELS + 1, dtype=np.int32)
    batch = collate_padded([Tokens(ids, np.ones(len(ids), dtype=bool))], [0], 0).to(DEVICE)
    for elements in (CHUNK_ELEMENTS, 1 << 26, CUDA_CHUNK_ELEMENTS, 1 << 28):
        label_loss, memory = LabelLoss(model, chunk_elements=elements // SCALE**2), PeakMemory()
        # the gradient of the hidden states is what it costs; that of the norm's weight is next to nothing
        both_ms = median_ms(partial(_backward, label_loss, model, batch, weight), 5, 1)
        found = {"labels_a_chunk": elements // FULL_SIZES[3], "both_ms": both_ms, "peak_gib": memory.gib()}
        emit("micro", "loss of 4096 labels, 128256 words", chunk_elements=elements, **found)


def _backward(label_loss: LabelLoss, model: Any, batch: Any, weight: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(label_loss(model, batch), [weight])
