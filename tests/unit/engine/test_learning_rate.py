"""The learning rate against transformers' own schedules, and within its bounds everywhere."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import load
from trainer.config.schema import OptimConfig, ScheduleConfig
from trainer.engine.learning_rate import decay_steps, learning_rate, peak_learning_rate, warmup_steps
from trainer.engine.optimizer_state import AdamState
from trainer.engine.optimizers import GroupwiseAdamW, adamw

quick = settings(max_examples=120, deadline=None)
schedules = st.builds(
    ScheduleConfig,
    name=st.sampled_from(["cosine", "linear", "constant", "wsd"]),
    warmup_ratio=st.floats(0, 1),
    warmup_steps=st.none() | st.integers(0, 300),
    min_ratio=st.just(0.0) | st.floats(0, 1),
    decay_ratio=st.floats(0.001, 1),
    decay_shape=st.sampled_from(["cosine", "linear", "1-sqrt"]),
)


def transformers_factor(name: str, warmup: int, total: int) -> list[float]:
    import transformers as t

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    make = {
        "cosine": lambda: t.get_cosine_schedule_with_warmup(optimizer, warmup, total),
        "linear": lambda: t.get_linear_schedule_with_warmup(optimizer, warmup, total),
        "constant": lambda: t.get_constant_schedule_with_warmup(optimizer, warmup),
    }[name]()
    return [make.lr_lambdas[0](step) for step in range(total + 1)]


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 10), (3, 10), (10, 10), (30, 1000)])
def test_equals_transformers(name: str, warmup: int, total: int) -> None:
    """Alike after the warmup; in it, transformers wastes its first update on a rate of 0, so it is one step behind."""
    expected = transformers_factor(name, warmup, total)
    schedule = ScheduleConfig(name=name, warmup_steps=warmup)
    for step in range(total):
        of_theirs = step + 1 if step < warmup else step
        assert learning_rate(step, total, 1.0, schedule) == pytest.approx(expected[of_theirs], abs=1e-12) or (
            step == warmup - 1 and learning_rate(step, total, 1.0, schedule) == 1.0
        )


@pytest.mark.parametrize("shape", ["cosine", "linear", "1-sqrt"])
@pytest.mark.parametrize("min_ratio", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(
    ("warmup", "decay", "total"), [(0, 1, 1), (0, 10, 10), (3, 2, 10), (30, 100, 1000), (5, 5, 10)]
)
def test_wsd_equals_transformers(shape: str, min_ratio: float, warmup: int, decay: int, total: int) -> None:
    """Behind the warmup, which is ours at every shape: theirs begins at ``min_ratio``."""
    import transformers as t

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    made = t.get_wsd_schedule(optimizer, warmup, decay, total, decay_type=shape, min_lr_ratio=min_ratio)
    schedule = ScheduleConfig(
        name="wsd", warmup_steps=warmup, min_ratio=min_ratio, decay_ratio=decay / total, decay_shape=shape
    )
    assert decay_steps(schedule, total) == decay
    for step in range(total):
        expected = (step + 1) / warmup if step < warmup else made.lr_lambdas[0](step)
        assert learning_rate(step, total, 1.0, schedule) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("min_ratio", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 10), (3, 10), (30, 1000)])
def test_a_cosine_that_ends_above_0_equals_transformers(min_ratio: float, warmup: int, total: int) -> None:
    import transformers as t

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    make = t.optimization.get_cosine_with_min_lr_schedule_with_warmup
    made = make(optimizer, warmup, total, min_lr_rate=min_ratio)
    line = ScheduleConfig(name="linear", warmup_steps=warmup, min_ratio=min_ratio)
    for step in range(warmup, total):
        ours = learning_rate(step, total, 1.0, ScheduleConfig(warmup_steps=warmup, min_ratio=min_ratio))
        assert ours == pytest.approx(made.lr_lambdas[0](step), abs=1e-12)
        left = (total - step) / (total - warmup)
        assert learning_rate(step, total, 1.0, line) == pytest.approx(min_ratio + (1 - min_ratio) * left)


@quick
@given(st.integers(1, 400), schedules, st.floats(1e-8, 1))
def test_bounds_and_shape(total: int, schedule: ScheduleConfig, peak: float) -> None:
    warmup = warmup_steps(schedule, total)
    assert 0 <= warmup <= total
    rates = [learning_rate(step, total, peak, schedule) for step in range(total)]
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in rates), "an update at rate 0 is paid for and does nothing"
    if schedule.name != "constant":
        assert all(rate >= schedule.min_ratio * peak * (1 - 1e-12) for rate in rates[warmup:])
    rising, falling = rates[:warmup], rates[warmup:]
    assert all(a < b for a, b in pairwise(rising))
    assert all(a >= b for a, b in pairwise(falling))
    if warmup:
        assert rising[-1] == pytest.approx(peak)
    if falling:
        assert falling[0] == pytest.approx(peak)


def test_warmup_ratio_is_rounded_up_and_not_past_itself() -> None:
    for percent in range(101):
        for total in range(1, 301):
            expected = -(-percent * total // 100)  # in whole numbers; 0.07 * 100 is a little more than 7
            assert warmup_steps(ScheduleConfig(warmup_ratio=percent / 100), total) == expected


def test_warmup_steps_overrule_the_ratio_and_stay_within_the_run() -> None:
    assert warmup_steps(ScheduleConfig(warmup_ratio=0.5, warmup_steps=7), 100) == 7
    assert warmup_steps(ScheduleConfig(warmup_ratio=0.5, warmup_steps=0), 100) == 0
    assert warmup_steps(ScheduleConfig(warmup_steps=700), 100) == 100


def test_peak_rate_is_the_methods_own_or_what_was_given() -> None:
    common = ["model=tiny", "data=headlines"]
    assert peak_learning_rate(load([*common, "method=lora"])) == 2e-4
    assert peak_learning_rate(load([*common, "method=full", "rank=null"])) == 2e-5
    assert peak_learning_rate(load([*common, "optim.learning_rate=0.5"])) == 0.5


def test_adamw_by_the_papers_formula() -> None:
    keys = OptimConfig(weight_decay=0.1, beta1=0.8, beta2=0.95, eps=1e-6)
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    optimizer = adamw([weight], keys)
    assert optimizer.param_groups[0]["lr"] == 0.0
    w, m, v = weight.detach().clone(), torch.zeros(3).double(), torch.zeros(3).double()
    for t, gradient in enumerate(torch.tensor([[0.3, -1.0, 0.0], [0.1, 2.0, -4.0], [5.0, 0.0, 0.2]]).double(), start=1):
        rate = 0.1 / t
        m, v = 0.8 * m + 0.2 * gradient, 0.95 * v + 0.05 * gradient**2
        w = w - rate * 0.1 * w - rate * (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-6)
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = gradient
        optimizer.step()
        torch.testing.assert_close(weight.detach(), w)


optims = st.builds(
    OptimConfig,
    beta1=st.floats(0, 0.99),
    beta2=st.floats(0.5, 0.999),
    eps=st.floats(1e-10, 1e-3),
    weight_decay=st.floats(0, 0.5),
)
updates = st.lists(st.lists(st.none() | st.floats(0, 1), min_size=3, max_size=3), max_size=5)


@quick
@given(st.lists(optims, min_size=3, max_size=3), updates, st.integers(0, 5))
def test_each_group_is_an_optimizer_of_its_own(optims: list[OptimConfig], updates: list, seed: int) -> None:
    """To the bit; ``None``: a group that takes no step, whose gradient may be anything. Moments are made beforehand."""
    torch.manual_seed(seed)
    mine = [[torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))] for _ in optims]
    theirs = [[torch.nn.Parameter(p.detach().clone()) for p in own] for own in mine]
    together = GroupwiseAdamW(zip(mine, optims, strict=True))
    AdamState().reset(together, 0, [p for own in mine for p in own], 0)
    alone = [adamw(own, optim) for own, optim in zip(theirs, optims, strict=True)]
    for scales in updates:
        for group, own, other, one, scale in zip(together.param_groups, mine, theirs, alone, scales, strict=True):
            group["lr"] = one.param_groups[0]["lr"] = 0.1
            group["takes_step"], group["gradient_scale"] = scale is not None, scale
            for p, q in zip(own, other, strict=True):
                p.grad = torch.randn_like(p) if scale is not None else torch.full_like(p, float("nan"))
                q.grad = None if scale is None else p.grad * scale
        together.step()
        for one in alone:
            one.step()
    for own, other, one in zip(mine, theirs, alone, strict=True):
        for p, q in zip(own, other, strict=True):
            assert torch.equal(p, q)
            assert all(torch.equal(together.state[p][kind], value) for kind, value in one.state[q].items())
