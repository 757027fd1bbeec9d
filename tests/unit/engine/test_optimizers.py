"""Optimizers keep the settings of each group, and their moments in 8 bits survive being written as numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trainer.config.optimizers import OPTIMIZERS
from trainer.config.schema import OptimConfig
from trainer.engine.optimizer_state import STATES
from trainer.engine.optimizers import check_device, make_optimizer, momentum, split_for_muon, token_tables
from trainer.engine.quantised_moments import BLOCK, dequantise, quantise
from trainer.errors import ConfigError

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_is_that_of_the_group(name: str) -> None:
    """Without a gradient's part a step multiplies by 1 - rate * decay: by each group's own, or by optim's."""
    params = [nn.Parameter(torch.full((3, 4), 2.0)) for _ in range(2)]
    groups = [{"params": [params[0]], "weight_decay": 0.0, "lr_scale": 4.0}, {"params": [params[1]]}]
    if name == "muon":
        groups = split_for_muon(groups, [])
    optimizer = make_optimizer(groups, OptimConfig(name=name, weight_decay=0.5))
    assert [group.get("lr_scale") for group in optimizer.param_groups] == [4.0, None]
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for parameter in params:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert [p.detach().mean().item() for p in params] == pytest.approx([2.0, 2.0 * (1 - 0.1 * 0.5)])


@pytest.mark.parametrize("turned", [(False, True), (True, False), (True, True)])
def test_adamw_takes_gradients_laid_out_otherwise_than_their_weights(turned: tuple[bool, bool]) -> None:
    """torch's fused kernel reads both in the order of memory, and says nothing."""

    def laid_out(values: torch.Tensor, is_turned: bool) -> torch.Tensor:
        return values.t().contiguous().t() if is_turned else values.clone()

    torch.manual_seed(0)
    values, gradients = torch.randn(5, 7), torch.randn(4, 5, 7)
    optim = OptimConfig(weight_decay=0.1)
    found = nn.Parameter(laid_out(values, turned[0]))
    stock = nn.Parameter(values.clone())
    ours = make_optimizer([{"params": [found]}], optim)
    keys = {"betas": (optim.beta1, optim.beta2), "eps": optim.eps, "weight_decay": optim.weight_decay}
    theirs = torch.optim.AdamW([stock], lr=0.0, foreach=False, **keys)
    for gradient in gradients:
        found.grad, stock.grad = laid_out(gradient, turned[1]), gradient.clone()
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = 0.1
            optimizer.step()
    torch.testing.assert_close(found, stock)


def test_muon_takes_the_matrices_between_embedding_and_head() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.inner, self.head = nn.Embedding(7, 4), nn.Linear(4, 6), nn.Linear(6, 7, bias=False)
            self.row = nn.Parameter(torch.ones(1, 6))

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    model = Model()
    groups = split_for_muon([{"params": list(model.parameters()), "weight_decay": 0.3}], token_tables(model))
    assert [(group["uses_muon"], group["weight_decay"]) for group in groups] == [(True, 0.3), (False, 0.3)]
    matrices, others = ({id(p) for p in group["params"]} for group in groups)
    assert matrices == {id(model.inner.weight)}
    assert others == {id(p) for p in (model.tokens.weight, model.inner.bias, model.head.weight, model.row)}
    with pytest.raises(ConfigError, match=r"optim.name=muon.*no matrix"):
        split_for_muon([{"params": [model.row]}], [])


def test_pages_need_a_gpu() -> None:
    with pytest.raises(ConfigError, match=r"optim.name=paged_adamw_8bit.*optim.name=adamw_8bit"):
        check_device(OptimConfig(name="paged_adamw_8bit"), CPU)
    check_device(OptimConfig(name="paged_adamw_8bit"), torch.device("cuda"))
    check_device(OptimConfig(name="adamw_8bit"), CPU)


def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else object())
    with pytest.raises(ConfigError, match=r"optim.name=lion: bitsandbytes has it, and is not installed"):
        check_device(OptimConfig(name="lion"), CPU)
    check_device(OptimConfig(name="muon"), CPU)


def test_momentum_is_the_authors_unless_it_is_given() -> None:
    assert [momentum(OptimConfig(name=name)) for name in ("lion", "muon")] == [0.99, 0.95]
    assert momentum(OptimConfig(name="lion", momentum=0.0)) == 0.0


@pytest.mark.parametrize("signed", [True, False])
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 3 * BLOCK), scale=st.floats(1e-12, 1e3))
def test_codes_survive_as_numbers(signed: bool, seed: int, count: int, scale: float) -> None:
    """What bitsandbytes has quantised is the same to the bit after it was written in fp32 and quantised again."""
    from bitsandbytes import functional

    values = torch.randn(count, generator=torch.Generator().manual_seed(seed)).pow(3) * scale
    values[: BLOCK // 2] *= 0 if seed % 3 == 0 else 1
    levels = functional.create_dynamic_map(signed=signed)
    codes, state = functional.quantize_blockwise(values if signed else values.abs(), code=levels, blocksize=BLOCK)
    written = dequantise(codes, state.absmax, levels)
    assert torch.equal(written, functional.dequantize_blockwise(codes, state))
    again = dequantise(*quantise(written, levels), levels)
    assert torch.equal(again, written)


def test_values_in_other_blocks_are_the_nearest() -> None:
    from bitsandbytes import functional

    values = torch.randn(5 * BLOCK, generator=torch.Generator().manual_seed(0))
    levels = functional.create_dynamic_map(signed=True)
    codes, scales = quantise(values, levels)
    stock, state = functional.quantize_blockwise(values, code=levels, blocksize=BLOCK)
    assert torch.equal(scales, state.absmax)
    assert (codes != stock).float().mean() < 0.01  # ties
    assert (dequantise(codes, scales, levels) - values).norm() < 0.02 * values.norm()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_is_made_as_the_optimizer_makes_it(name: str) -> None:
    def build() -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape)) for shape in ((80, 60), (5,), (4, 3))]
        groups = [{"params": params}]
        groups = split_for_muon(groups, []) if name == "muon" else groups
        optimizer = make_optimizer(groups, OptimConfig(name=name))
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        for parameter in params:
            parameter.grad = torch.randn_like(parameter)
        return optimizer, params

    (stock, theirs), (ours, mine) = build(), build()
    STATES[name].reset(ours, 0, mine, 0)
    for optimizer in (stock, ours):
        optimizer.step()
    for their, my in zip(theirs, mine, strict=True):
        assert torch.equal(their, my)
        assert stock.state[their].keys() == ours.state[my].keys()
        for key, value in stock.state[their].items():
            assert (
                value == ours.state[my][key] if not torch.is_tensor(value) else torch.equal(value, ours.state[my][key])
            )
