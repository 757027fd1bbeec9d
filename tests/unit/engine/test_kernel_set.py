"""Kernels are chosen by device and dtype, and one that is wrong or raises is taken out, by name and with its reason."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import trainer.engine.kernel_set as kernel_set
import trainer.kernels.lora_linear as lora_linear
import trainer.kernels.rms_norm as rms_norm
import trainer.kernels.trie_attention as trie_attention
import trainer.kernels.varlen_attention as varlen_attention
from tests.helpers.architectures import tiny
from tests.unit.engine.test_verify_kernels import DATA, made
from trainer.config import TrainConfig, load
from trainer.engine.kernel_set import KernelSet, wanted_kernels
from trainer.engine.verify_kernels import Choice, choose_packing_and_kernels
from trainer.errors import ConfigError
from trainer.kernels.label_loss import LabelLoss
from trainer.kernels.liger import patch_rope, patch_swiglu

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ON_CPU = ("varlen", "lora", "rms_norm")  # what can be forced there


def config(*overrides: str) -> TrainConfig:
    return load(["debug=tiny", "batch.global_size=8", *overrides])


def choose(model: Any, loss: LabelLoss, packing: str = "auto", names: tuple[str, ...] = ON_CPU) -> Choice:
    return choose_packing_and_kernels(model, loss, config(f"batch.packing={packing}"), DATA, 0, KernelSet(model, names))


def raises(*_: Any) -> Tensor:
    raise RuntimeError("no kernel image is available")


def off_by_a_hundredth(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: function(*args) * 1.01


class _Apply:
    def __init__(self, apply: Callable[..., Any]) -> None:
        self.apply = apply


def put_in(patch: pytest.MonkeyPatch, name: str, broken: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    if name == "varlen":
        patch.setattr(trie_attention, "attend_pieces", broken(trie_attention.attend_pieces))
    elif name == "lora":
        patch.setattr(lora_linear, "LoraLinear", _Apply(broken(lora_linear.LoraLinear.apply)))
    else:
        patch.setattr(rms_norm, "rms_norm", broken(rms_norm.rms_norm))


@pytest.mark.parametrize("packing", ["trie", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_that_hold_are_used(dtype: torch.dtype, packing: str) -> None:
    model, loss = made("llama", dtype, adapter=True)
    choice = choose(model, loss, packing)
    assert choice.kernels == ON_CPU
    assert (choice.packing.uses_trie, choice.packing.in_pieces) == (packing == "trie", True)
    assert choice.lines[-1].startswith("kernels: varlen, lora, rms_norm, verified against eager attention")


@pytest.mark.parametrize("packing", ["auto", "padded"])
@pytest.mark.parametrize("way", ["raises", "is wrong by a hundredth"])
@pytest.mark.parametrize("name", ON_CPU)
def test_a_broken_kernel_is_left_out_and_the_run_goes_on(
    name: str, way: str, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, loss = made("llama", torch.float32, adapter=True)
    # after the installation, where a norm is compared with its own module already
    kernels = KernelSet(model, ON_CPU)
    put_in(monkeypatch, name, (lambda _: raises) if way == "raises" else off_by_a_hundredth)
    choice = choose_packing_and_kernels(model, loss, config(f"batch.packing={packing}"), DATA, 0, kernels)
    assert choice.kernels == tuple(each for each in ON_CPU if each != name)
    assert choice.packing.uses_trie == (packing == "auto")
    reason = "RuntimeError: no kernel image" if way == "raises" else "losses within"
    (line,) = (line for line in choice.lines if "left out" in line)
    assert line.startswith(f"kernels: {name} left out on ")
    assert reason in line


@pytest.mark.parametrize("way", ["raises", "is wrong by a hundredth"])
def test_varlen_that_is_wrong_in_16_bits_alone_is_left_out(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose varlen kernel has no fp32: a run of the whole model would not show a hundredth."""
    right = varlen_attention.attend_one_by_one

    def attend(pieces: Any, window: Any, scaling: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        is_candidate = q.dtype == torch.bfloat16 and sys._getframe(1).f_code.co_name == "_attend"
        if is_candidate and way == "raises":
            raise RuntimeError("no kernel image is available")
        return right(pieces, window, scaling, q, k, v) * (1.01 if is_candidate else 1)

    monkeypatch.setattr(varlen_attention, "attend_one_by_one", attend)
    model, loss = made("llama", torch.bfloat16, adapter=True)
    choice = choose(model, loss)
    assert (choice.kernels, choice.packing.uses_trie) == (("lora", "rms_norm"), True)
    (line,) = (line for line in choice.lines if "left out" in line)
    assert ("no kernel image" if way == "raises" else "varlen attention is 1.1e-02 from fp32") in line


def test_several_broken_kernels_are_all_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss = made("llama", torch.float32, adapter=True)
    kernels = KernelSet(model, ON_CPU)
    for name in ("varlen", "rms_norm"):
        put_in(monkeypatch, name, off_by_a_hundredth)
    choice = choose_packing_and_kernels(model, loss, config(), DATA, 0, kernels)
    assert (choice.kernels, choice.packing.uses_trie) == ((), True)
    assert any("varlen, lora, rms_norm left out" in line for line in choice.lines)


def test_a_wrong_trie_costs_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    import trainer.data.batching.micro_batch as micro

    def wrong(*args: Any, **more: Any) -> Any:
        trie = right(*args, **more)
        trie.depths[len(trie.depths) // 2 :] += 1
        return trie

    right = micro.build_trie
    monkeypatch.setattr(micro, "build_trie", wrong)
    model, loss = made("llama", torch.float32, adapter=True)
    choice = choose(model, loss)
    assert (choice.kernels, choice.packing.uses_trie) == (ON_CPU, False)
    assert "differs from padded" in choice.lines[0]


def test_kernels_are_taken_out_and_put_back() -> None:
    model, _ = made("llama", torch.float32, adapter=True)
    ids = torch.arange(5, 25)[None]
    stock = model(input_ids=ids).logits
    kernels = KernelSet(model, ("varlen", "rms_norm", "lora"))
    patched = model(input_ids=ids).logits
    assert kernels.names == ON_CPU
    with kernels.without("lora", "rms_norm"):
        assert torch.equal(model(input_ids=ids).logits, stock)
    assert torch.equal(model(input_ids=ids).logits, patched)
    kernels.remove("varlen", "rms_norm")
    kernels.use(("lora", "varlen"))
    assert kernels.names == ("varlen", "lora")


@pytest.mark.parametrize(
    ("device", "dtype", "overrides", "expected"),
    [
        (CPU, torch.float32, (), ("rms_norm",)),
        (CPU, torch.bfloat16, ("model.kernels=none",), ()),
        (CPU, torch.float32, ("model.kernels=[lora]",), ("lora",)),
        (CPU, torch.float32, ("model.compile=true",), ("rms_norm", "compile")),
        (CUDA, torch.bfloat16, (), ("varlen", "lora", "swiglu", "rope", "rms_norm")),
        (CUDA, torch.float32, (), ("lora", "swiglu", "rope", "rms_norm")),
        (
            CUDA,
            torch.float16,
            ("model.gradient_checkpointing=selective",),
            ("varlen", "lora", "swiglu", "rope", "rms_norm"),
        ),
        (CUDA, torch.bfloat16, ("model.kernels=none",), ()),
    ],
)
def test_kernels_by_device_and_dtype(
    device: torch.device,
    dtype: torch.dtype,
    overrides: tuple[str, ...],
    expected: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernel_set, "liger_obstacle", lambda: None)
    model, _ = made("llama", torch.float32)
    assert wanted_kernels(config(*overrides), model, device, dtype) == expected


def test_attention_that_cannot_be_in_pieces_stays_as_it_is() -> None:
    model, _ = made("llama", torch.float32)
    model.config.attention_dropout = 0.1
    assert "varlen" not in wanted_kernels(config(), model, CUDA, torch.bfloat16)
    eager = tiny("llama")
    eager.set_attn_implementation("eager")
    assert "varlen" not in wanted_kernels(config(), eager, CUDA, torch.bfloat16)


def test_a_kernel_that_was_asked_for_and_cannot_be_is_an_error() -> None:
    model, _ = made("llama", torch.float32)
    with pytest.raises(ConfigError, match=r"model.kernels=swiglu.*liger-kernel runs on CUDA.*model.kernels=auto"):
        wanted_kernels(config("model.kernels=[lora,swiglu]"), model, CPU, torch.float32)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """liger-kernel's functions in plain PyTorch: its own need a GPU."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    class SiLUMul:
        @staticmethod
        def apply(gate: Tensor, up: Tensor) -> Tensor:
            return torch.nn.functional.silu(gate) * up

    for name, content in {
        "liger_kernel.ops.swiglu": {"LigerSiLUMulFunction": SiLUMul},
        "liger_kernel.transformers.rope": {"liger_rotary_pos_emb": apply_rotary_pos_emb},
    }.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(("name", "patches"), [("llama", True), ("qwen2", True), ("gemma", False), ("gpt2", False)])
def test_swiglu_is_patched_where_it_is_one(name: str, patches: bool) -> None:
    """Gemma's MLP is gated by GELU; GPT-2's has no gate."""
    torch.manual_seed(0)
    model = tiny(name)
    ids = torch.arange(5, 25)[None]
    expected = model(input_ids=ids).logits
    patch = patch_swiglu(model)
    assert (patch is not None) == patches
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    if patch is not None:
        patch.undo()
    assert torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.usefixtures("stand_in")
def test_rope_is_patched_in_the_models_own_code() -> None:
    from transformers.models.llama import modeling_llama

    stock = modeling_llama.apply_rotary_pos_emb
    model = copy.deepcopy(made("llama", torch.float32, adapter=True)[0])
    patch = patch_rope(model)
    assert patch is not None
    assert modeling_llama.apply_rotary_pos_emb is not stock
    patch.undo()
    assert modeling_llama.apply_rotary_pos_emb is stock
    assert patch_rope(tiny("gpt2")) is None
