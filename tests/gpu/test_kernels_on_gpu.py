"""The kernels that a CPU cannot run, against fp32, and runs that must give the same bits. Skipped without a GPU."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.architectures import tiny
from tests.helpers.processes import torchrun
from trainer.config.method import MethodConfig
from trainer.data.batching.micro_batch import Tokens
from trainer.data.batching.packing import Packing
from trainer.data.batching.rank_split import Limits
from trainer.engine.kernel_set import INSTALL, KernelSet
from trainer.engine.verify_varlen import verify_varlen
from trainer.kernels.label_loss import LabelLoss
from trainer.kernels.liger import liger_obstacle
from trainer.kernels.trial_lora import ActiveTrials, patch_trial_linears
from trainer.kernels.trie_attention import KERNEL, register, trie_context
from trainer.methods import attach
from trainer.methods.attach import attach_trials

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)


def rows(seed: int = 0) -> list[Tokens]:
    rng = np.random.default_rng(seed)
    shared = rng.integers(2, 40, 24)
    ids = [np.append(shared, rng.integers(2, 40, n)).astype(np.int32) for n in (5, 9, 17, 30)]
    return [Tokens(i, np.arange(len(i)) >= len(i) - 4) for i in ids]


def adapted(name: str) -> Any:
    torch.manual_seed(0)
    model = tiny(name)
    register()
    model.set_attn_implementation(KERNEL)
    model = attach(model, MethodConfig(r=4), seed=0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(0, 0.05)
    return model


def gradients(model: Any, device: torch.device, in_pieces: bool) -> Tensor:
    loss = LabelLoss(model.to(device).eval())
    batch = Packing(True, Limits(None, 4096), 0, in_pieces).collate(rows(), range(4)).to(device)
    with trie_context(batch.paths):
        value = loss(model, batch)
        found = torch.autograd.grad(value, [p for p in model.parameters() if p.requires_grad])
    return torch.cat([g.flatten().double().cpu() for g in found])


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_varlen_attention_is_no_further_from_fp32_than_sdpa(dtype: torch.dtype, window: int | None) -> None:
    verification = verify_varlen(tiny("llama", head_dim=64), dtype, GPU, window)
    assert verification.holds, verification


@pytest.mark.parametrize("kernel", [name for name in INSTALL if name not in ("varlen", "compile")])
def test_a_kernel_gives_the_gradients_of_the_cpu(kernel: str) -> None:
    if kernel in ("swiglu", "rope") and (reason := liger_obstacle()) is not None:
        pytest.skip(reason)
    model = adapted("llama")
    expected = gradients(model, torch.device("cpu"), in_pieces=False)
    kernels = KernelSet(model.to(GPU), (kernel,))
    assert kernels.names == (kernel,)
    found = gradients(model, GPU, in_pieces=False)
    kernels.remove(kernel)  # some are on the code of all models of this kind
    assert distance(found, expected) < 1e-4


def test_every_kernel_in_bf16_is_no_further_from_fp32_than_none() -> None:
    exact = gradients(adapted("llama").double(), torch.device("cpu"), in_pieces=False)
    plain = distance(gradients(adapted("llama").bfloat16(), GPU, in_pieces=False), exact)
    model = adapted("llama").bfloat16().to(GPU)
    names = ("lora", "rms_norm") if liger_obstacle() else ("lora", "swiglu", "rope", "rms_norm")
    kernels = KernelSet(model, names)
    found = gradients(model, GPU, in_pieces=True)
    kernels.remove(*kernels.names)
    assert distance(found, exact) <= 2 * plain


def trials_gradients(device: torch.device, dtype: torch.dtype, in_pieces: bool) -> Tensor:
    """Of three trials of unlike ranks through one forward."""
    torch.manual_seed(0)
    methods = MethodConfig(r=4), MethodConfig(r=3, target_modules="attention"), MethodConfig(r=16)
    trials = {f"trial_{k}": (method, k) for k, method in enumerate(methods)}
    register()
    model = attach_trials(tiny("llama"), trials)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    model = model.to(device, dtype).eval()
    model.base_model.model.set_attn_implementation(KERNEL)
    patch_trial_linears(model, ActiveTrials(tuple(trials)))
    loss = LabelLoss(model, chunk_elements=400)
    batch = Packing(True, Limits(None, 4096), 0, in_pieces).collate(rows(), range(4)).to(device)
    with trie_context(batch.paths, 3):
        value = loss(model, batch, 3).sum()
        found = torch.autograd.grad(value, [p for p in model.parameters() if p.requires_grad])
    return torch.cat([g.flatten().double().cpu() for g in found])


@pytest.mark.parametrize("in_pieces", [False, True])
def test_trials_through_one_forward_have_the_gradients_of_the_cpu(in_pieces: bool) -> None:
    exact = trials_gradients(torch.device("cpu"), torch.float64, in_pieces=False)
    assert distance(trials_gradients(GPU, torch.float32, in_pieces), exact) < 1e-4
    in_16_bits = distance(trials_gradients(torch.device("cpu"), torch.bfloat16, in_pieces=False), exact)
    assert distance(trials_gradients(GPU, torch.bfloat16, in_pieces), exact) <= 2 * in_16_bits


@pytest.mark.parametrize("method", ["lora", "qlora", "qlora_8bit"])
def test_the_log_says_which_kernels_hold(tiny_model: Path, tmp_path: Path, method: str) -> None:
    overrides = ["debug=tiny", "model.dtype=bf16", f"method={method}", "run.name=kernels"]
    torchrun("trainer.train", *overrides, nproc=1, cwd=tmp_path)
    log = (tmp_path / "runs" / "kernels" / "log.txt").read_text()
    (line,) = (line for line in log.splitlines() if "kernels:" in line)
    assert "varlen, lora" in line, log
    assert "left out" not in log


@pytest.mark.parametrize("overrides", [[], ["model.gradient_checkpointing=selective"], ["zero=stage3"]])
def test_a_resumed_deterministic_run_is_the_undisturbed_one_to_the_bit(
    tiny_model: Path, tmp_path: Path, overrides: list[str]
) -> None:
    common = ["debug=tiny", "model.dtype=bf16", "run.deterministic=true", "run.name=run", *overrides]
    common += ["batch.max_steps=8", "batch.epochs=9", "checkpoint.every_steps=4", "checkpoint.keep=9"]
    torchrun("trainer.train", *common, nproc=1, cwd=tmp_path)
    first, second = tmp_path / "runs" / "run", tmp_path / "again" / "runs" / "run"
    shutil.copytree(first, second)
    for name in ("adapter", "checkpoints/step-00000008"):
        shutil.rmtree(second / name, ignore_errors=True)
    (second / "summary.json").unlink()
    torchrun("trainer.train", *common, nproc=1, cwd=tmp_path / "again")
    one, other = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (first, second))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
