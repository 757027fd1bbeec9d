"""One forward of the layers of several trials is PEFT's for each of them, whatever they adapt and in whatever dtype."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from tests.helpers.architectures import tiny
from trainer.kernels import trial_lora
from trainer.kernels.trial_lora import ActiveTrials, AddTrials, TrialsLinear, patch_trial_linears

LAYERS = ("first", "second", "third")


class Layers(nn.Module):
    """Three linear layers, of which one has no bias."""

    config: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self.config = {}
        self.first, self.second, self.third = nn.Linear(6, 5), nn.Linear(5, 7, bias=False), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return out


@dataclass(frozen=True)
class Kind:
    """One trial's adapter."""

    rank: int
    alpha: float
    use_rslora: bool
    targets: tuple[str, ...]


kinds = st.builds(
    Kind,
    st.integers(1, 5),
    st.sampled_from([1.0, 5.0, 16.0]),
    st.booleans(),
    st.lists(st.sampled_from(LAYERS), min_size=1, max_size=3, unique=True).map(tuple),
)


def adapted(drawn: list[Kind], dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    model: Any = Layers().to(dtype)
    for k, kind in enumerate(drawn):
        config = LoraConfig(
            r=kind.rank, lora_alpha=kind.alpha, use_rslora=kind.use_rslora, target_modules=list(kind.targets)
        )
        if k == 0:
            model = PeftModel(model, config, adapter_name="trial_0", autocast_adapter_dtype=False)
        else:
            model.add_adapter(f"trial_{k}", config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
            nn.init.normal_(parameter)
    return model


def own_parameters(model: Any, name: str) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if f".{name}." in n]


def by_peft(model: Any, names: list[str], x: Tensor) -> list[Tensor]:
    """Run each trial's rows through PEFT's own forward; return outputs and gradients."""
    leaf = x.detach().requires_grad_()
    parts = []
    for name, own in zip(names, leaf.chunk(len(names)), strict=True):
        model.base_model.set_adapter(name)
        parts.append(model(own))
    for parameter in (p for name in names for p in own_parameters(model, name)):
        parameter.requires_grad_(True)
    out = torch.cat(parts)
    wanted = [leaf, *(p for name in names for p in own_parameters(model, name))]
    return [out, *torch.autograd.grad(out.square().sum(), wanted)]


def together(model: Any, names: list[str], x: Tensor) -> list[Tensor]:
    patch = patch_trial_linears(model, ActiveTrials(tuple(names)))
    assert patch is not None
    leaf = x.detach().requires_grad_()
    out = model(leaf)
    wanted = [leaf, *(p for name in names for p in own_parameters(model, name))]
    found = [out, *torch.autograd.grad(out.square().sum(), wanted)]
    patch.undo()
    return found


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the functions that ran."""
    names: set[str] = set()
    for function in (TrialsLinear, AddTrials):

        def apply(*args: Any, whole: Any = function.apply, name: str = function.__name__) -> Any:
            names.add(name)
            return whole(*args)

        monkeypatch.setattr(trial_lora, function.__name__, type(function.__name__, (), {"apply": staticmethod(apply)}))
    return names


@settings(max_examples=60, deadline=None)
@given(
    drawn=st.lists(kinds, min_size=1, max_size=6),
    rows=st.integers(1, 3),
    is_frozen=st.booleans(),
    pads=st.booleans(),
    data=st.data(),
)
def test_any_trials_are_pefts(drawn: list[Kind], rows: int, is_frozen: bool, pads: bool, data: st.DataObject) -> None:
    """Some of them active, in any order; dense layers, and those that keep their own product."""
    model = adapted(drawn)
    if not is_frozen:
        model.base_model.model.second.requires_grad_(True)
    every = [f"trial_{k}" for k in range(len(drawn))]
    names = data.draw(st.lists(st.sampled_from(every), min_size=1, unique=True))
    x = torch.randn(len(names) * rows, 2, 6, dtype=torch.float64)
    expected = by_peft(model, names, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial_lora, "pads_ranks", lambda _: pads)
        found = together(model, names, x)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


TWO = [Kind(4, 5.0, False, LAYERS), Kind(2, 16.0, True, ("first", "third"))]
NAMES = ["trial_0", "trial_1"]


def adapters_in_fp32() -> Any:
    """The base and its input are in bf16."""
    model = adapted(TWO, torch.bfloat16)
    for name in NAMES:
        for parameter in own_parameters(model, name):
            parameter.data = parameter.data.float()
    return model


def test_under_autocast_adapters_in_fp32_multiply_in_16_bits(used: set[str]) -> None:
    """As PEFT does with ZeRO stage 0: no further from fp64 in the mean of several inputs; gradients are fp32."""
    model = adapters_in_fp32()
    exact = copy.deepcopy(model).double()
    errors = torch.zeros(2)
    for _ in range(16):
        x = torch.randn(4, 9, 6, dtype=torch.bfloat16)
        truth = by_peft(exact, NAMES, x.double())
        with torch.autocast("cpu", torch.bfloat16):
            found = together(model, NAMES, x), by_peft(model, NAMES, x)
        assert [one.dtype for one in found[0]] == [other.dtype for other in found[1]]
        for k, tensors in enumerate(found):
            errors[k] += sum(float((one.detach() - t).norm() / t.norm()) for one, t in zip(tensors, truth, strict=True))
    assert errors[0] <= 1.1 * errors[1]
    assert errors[0] <= 0.05 * 16 * len(truth)
    assert used == {"TrialsLinear"}


def test_adapters_of_another_dtype_are_pefts_to_the_bit(used: set[str]) -> None:
    model = adapters_in_fp32()
    x = torch.randn(4, 9, 6, dtype=torch.bfloat16)
    for one, other in zip(together(model, NAMES, x), by_peft(model, NAMES, x), strict=True):
        assert torch.equal(one, other)
    assert used == set()


def test_matrices_that_their_own_modules_gather(used: set[str]) -> None:
    """As under ZeRO-3, which leaves nothing of a parameter between the calls of its module."""
    model = adapted(TWO)
    x = torch.randn(4, 9, 6, dtype=torch.float64)
    expected = by_peft(model, NAMES, x)
    for name, module in model.named_modules():
        if name.endswith(tuple(NAMES)) and isinstance(module, nn.Linear):
            whole = module.weight.data
            module.register_forward_pre_hook(lambda m, _, whole=whole: setattr(m.weight, "data", whole))
            module.register_forward_hook(lambda m, _, __: setattr(m.weight, "data", m.weight.data.new_empty(0)))
            module.weight.data = whole.new_empty(0)
    patch_trial_linears(model, ActiveTrials(tuple(NAMES)))
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected[0])
    assert used == set()


def test_without_adapters_it_is_the_base() -> None:
    model = adapted(TWO)
    x = torch.randn(4, 9, 6, dtype=torch.float64)
    torch.manual_seed(0)
    expected = Layers().double()(x)
    patch_trial_linears(model, ActiveTrials(tuple(NAMES)))
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    assert not torch.equal(model(x), expected)


def test_rows_that_are_not_the_trials_are_refused() -> None:
    model = adapted(TWO)
    patch_trial_linears(model, ActiveTrials(tuple(NAMES)))
    with pytest.raises(AssertionError, match="3 rows are of 2 trials"):
        model(torch.randn(3, 9, 6, dtype=torch.float64))


@pytest.mark.parametrize(
    "keys", [{"target_modules": ["embed_tokens"]}, {"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}]
)
def test_what_has_no_such_kernel_is_refused(keys: dict[str, Any]) -> None:
    model = PeftModel(tiny("llama"), LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **keys}))
    with pytest.raises(AssertionError):
        patch_trial_linears(model, ActiveTrials(("default",)))


def test_a_model_without_lora_has_nothing_to_patch() -> None:
    assert patch_trial_linears(tiny("llama"), ActiveTrials(("trial_0",))) is None
