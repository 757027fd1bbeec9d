"""Whether gradients are finite, against a look at every element."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trainer.engine.zero_engine import gradients_are_finite

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
values = st.sampled_from([0.0, -1.5, 65504.0, -1e15, float("nan"), float("inf"), float("-inf")])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(values, max_size=4)), max_size=5))
def test_every_element_is_looked_at(drawn: list[tuple[torch.dtype, list[float]]]) -> None:
    parameters = [nn.Parameter(torch.zeros(len(numbers), dtype=dtype)) for dtype, numbers in drawn]
    for parameter, (dtype, numbers) in zip(parameters, drawn, strict=True):
        parameter.grad = torch.tensor(numbers).to(dtype)
    gradients = [p.grad for p in parameters if p.grad is not None]
    expected = all(torch.isfinite(g).all() for g in gradients)
    without = nn.Parameter(torch.zeros(3))  # no gradient has come to it
    assert bool(gradients_are_finite([without, *parameters], CPU)) is expected


def test_a_norm_beyond_fp32_is_not_finite() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([1.0, 1e38])
    assert not gradients_are_finite([parameter], CPU)


@pytest.mark.parametrize("place", [0, 3_333_333, 4_999_999])
def test_one_of_millions_is_found(place: int) -> None:
    parameter = nn.Parameter(torch.zeros(5_000_000))
    parameter.grad = torch.ones_like(parameter)
    assert gradients_are_finite([parameter], CPU)
    parameter.grad[place] = float("nan")
    assert not gradients_are_finite([parameter], CPU)
