"""Try every reach into DeepSpeed on a tiny model, under each ZeRO stage, in one process; print what went wrong as JSON.

``tests/unit/test_compat.py`` starts it as a process of its own: DeepSpeed keeps its process group until the end.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import tempfile
import traceback
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trainer.compat import deepspeed as compat
from trainer.compat import deepspeed_groups as groups
from trainer.distributed import process_group

STAGES = (1, 2, 3)
X = torch.ones(2, 4, dtype=torch.bfloat16)


def build(stage: int, **more: Any) -> tuple[Any, Any, nn.Parameter]:
    """Return DeepSpeed's engine, its optimizer and the one weight, (4, 4), in bf16."""
    import deepspeed

    torch.manual_seed(0)
    model = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
        **more,
    }
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=adam, config=config)
    compat.check_optimizer(optimizer, stage, fp16=True)
    return engine, optimizer, model.weight


def master(parameter: nn.Parameter) -> torch.Tensor:
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter).clone()


def update(engine: Any, factor: float) -> None:
    engine.backward(engine(X).float().sum() * factor)
    engine.step()


def skip_shm_build() -> None:
    """The process group was started by then: without a compile, in less time than one would take."""
    import deepspeed

    assert deepspeed.comm.comm.cdb.shm_comm_op is None


def step_was_skipped() -> None:
    for stage in STAGES:
        engine, optimizer, weight = build(stage)
        for factor, skipped in ((1.0, False), (float("inf"), True), (1.0, False)):
            before = master(weight)
            update(engine, factor)
            assert compat.step_was_skipped(optimizer) == skipped
            assert torch.equal(master(weight), before) == skipped


def overflowing() -> None:
    """The gradients are dropped and nothing else: the next update is as if there had been none before it."""
    for stage in STAGES:
        engine, optimizer, weight = build(stage)
        before = master(weight)
        engine.backward(engine(X).float().sum())
        with compat.overflowing(optimizer, stage):
            engine.step()
        assert torch.equal(master(weight), before)
        update(engine, 2.0)
        assert not compat.step_was_skipped(optimizer)
        found = master(weight)
        engine, _, weight = build(stage)
        update(engine, 2.0)
        assert torch.equal(found, master(weight))


def moments_before_the_first_step() -> None:
    """What a resumed run does: moments made by hand are those that the API of DeepSpeed reads and writes."""
    from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state

    for stage in STAGES:
        _, optimizer, weight = build(stage)
        adam, shares = compat.base_optimizer(optimizer), compat.fp32_shares(optimizer, stage)
        assert isinstance(adam, torch.optim.AdamW)
        assert sum(share.numel() for share in shares) >= 16
        for share in shares:
            moments = {kind: torch.zeros_like(share, requires_grad=False) for kind in ("exp_avg", "exp_avg_sq")}
            adam.state[share] = {"step": torch.tensor(3.0), **moments}
        compat.link_moments(optimizer, stage)
        value = torch.arange(16.0).view(4, 4)
        safe_set_full_optimizer_state(weight, value, "exp_avg")
        assert torch.equal(safe_get_full_optimizer_state(weight, "exp_avg"), value)
        assert sum(float(adam.state[share]["exp_avg"].sum()) for share in shares) == float(value.sum())
        for share in shares:  # what is put there later is found after another link, on whatever device
            adam.state[share]["later"] = adam.state[share]["exp_avg"] * 2
        compat.link_moments(optimizer, stage)
        assert torch.equal(safe_get_full_optimizer_state(weight, "later"), value * 2)


def groups_of_parameters() -> None:
    """Shares and reduced gradients by group, under stage 3 also of a group that is cut into several; what is written to
    the gradients is what the step takes, and its moments are found in every group."""
    from deepspeed.utils import safe_get_full_optimizer_state

    for stage in STAGES:
        engine, optimizer, weights = build_groups(stage, sub_group_size=16)
        by_group = groups.fp32_shares_by_group(optimizer, stage, 2)
        assert [sum(s.numel() for s in shares) for shares in by_group] == [48, 16]
        assert [len(shares) for shares in by_group] == ([3, 1] if stage == 3 else [1, 1])
        before = [master(weight) for weight in weights]
        engine.backward(engine(X).float().sum())
        gradients = groups.reduced_gradients(optimizer, stage, 2)
        assert [sum(float(g.abs().sum()) > 0 for g in own) for own in gradients] == [3, 1]
        for gradient in gradients[0]:
            gradient.zero_()
        engine.step()
        assert [torch.equal(master(w), b) for w, b in zip(weights, before, strict=True)] == [True, True, True, False]
        compat.link_moments(optimizer, stage)
        moments = [safe_get_full_optimizer_state(weight, "exp_avg") for weight in weights]
        assert [bool(moment.any()) for moment in moments] == [False, False, False, True]


def build_groups(stage: int, **zero: Any) -> tuple[Any, Any, list[nn.Parameter]]:
    """Return DeepSpeed's engine, its optimizer with groups of three weights and of one, and the weights, in order."""
    import deepspeed

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False, dtype=torch.bfloat16) for _ in range(4)))
    weights = list(model.parameters())
    adam = torch.optim.AdamW([{"params": weights[:3]}, {"params": weights[3:]}], lr=1e-2, weight_decay=0.0)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, **zero},
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=adam, config=config)
    return engine, optimizer, weights


def detach() -> None:
    """A model that was taken from one engine trains on in another, and runs no hook of the first."""
    import deepspeed

    for stage in STAGES:
        engine, optimizer, weight = build(stage)
        update(engine, 1.0)
        expected = master(weight)
        model = engine.module
        first = weakref.ref(optimizer)
        compat.detach(engine, stage)
        hooks = [*model._forward_hooks.values(), *model._forward_pre_hooks.values()]
        assert not hooks, f"stage {stage}: {hooks}"
        adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
        config = {**engine.config, "train_batch_size": 1}
        again, _, _, _ = deepspeed.initialize(model=model, optimizer=adam, config=config)
        assert torch.equal(master(weight).bfloat16(), expected.bfloat16())
        update(again, 1.0)
        assert not torch.equal(master(weight), expected)
        del engine, optimizer
        gc.collect()
        assert first() is None, f"stage {stage}: the first optimizer is still held"


def loss_scale() -> None:
    for stage in STAGES:
        _, optimizer, _ = build(stage)
        assert compat.loss_scale(optimizer) == 1.0
        saved = compat.loss_scaler_state(optimizer)
        json.dumps(saved)
        compat.restore_loss_scaler(optimizer, {**saved, "cur_scale": 8.0})
        assert compat.loss_scale(optimizer) == 8.0
        assert compat.loss_scaler_state(optimizer) == {**saved, "cur_scale": 8.0}


def partitioned_parameters() -> None:
    for stage in STAGES:
        _, _, weight = build(stage, zero_optimization={"stage": stage, "stage3_param_persistence_threshold": 0})
        assert compat.is_partitioned(weight) == (stage == 3)
        assert tuple(weight.shape) == ((0,) if stage == 3 else (4, 4))
        assert compat.whole_shape(weight) == (4, 4)
        assert compat.whole_numel(weight) == 16


def partition_like() -> None:
    import deepspeed

    values = [torch.randn(5, 3), torch.randn(2, 2)]
    first, second = (nn.Parameter(value.clone()) for value in values)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    deepspeed.zero.Init(module=nn.ParameterList([first]), config_dict_or_path=config, dtype=torch.float32)
    compat.partition_like(first, second)
    assert first.ds_id != second.ds_id
    with deepspeed.zero.GatheredParameters([first, second]):
        assert all(torch.equal(p, value) for p, value in zip((first, second), values, strict=True))


def load_checkpoint() -> None:
    """What DeepSpeed saves is read back as data."""
    for stage in STAGES:
        engine, _, weight = build(stage)
        update(engine, 1.0)
        expected = master(weight)
        with tempfile.TemporaryDirectory() as folder:
            engine.save_checkpoint(folder, tag="state")
            update(engine, 1.0)
            assert not torch.equal(master(weight), expected)
            compat.load_checkpoint(engine, folder, "state")
        assert torch.equal(master(weight), expected)


# Reach -> what tries it.
CASES: dict[str, Callable[[], None]] = {
    "deepspeed.skip_shm_build": skip_shm_build,
    "deepspeed.step_was_skipped": step_was_skipped,
    "deepspeed.overflowing": overflowing,
    **dict.fromkeys(
        ("deepspeed.base_optimizer", "deepspeed.fp32_shares", "deepspeed.link_moments"), moments_before_the_first_step
    ),
    **dict.fromkeys(
        ("deepspeed.loss_scale", "deepspeed.loss_scaler_state", "deepspeed.restore_loss_scaler"), loss_scale
    ),
    **dict.fromkeys(
        ("deepspeed.is_partitioned", "deepspeed.whole_shape", "deepspeed.whole_numel"), partitioned_parameters
    ),
    **dict.fromkeys(
        ("deepspeed_groups.reduced_gradients", "deepspeed_groups.fp32_shares_by_group"), groups_of_parameters
    ),
    "deepspeed.detach": detach,
    "deepspeed.partition_like": partition_like,
    "deepspeed.load_checkpoint": load_checkpoint,
}


def run() -> dict[str, str]:
    """Return what went wrong by reach, empty where nothing did."""
    outcome: dict[Callable[[], None], str] = {}
    process_group.init(process_group.from_environment())
    for case in CASES.values():
        if case not in outcome:
            try:
                case()
                outcome[case] = ""
            except Exception:
                outcome[case] = traceback.format_exc()
    return {name: outcome[case] for name, case in CASES.items()}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        found = run()
    print(json.dumps(found), flush=True)
    process_group.shutdown()
    process_group.leave(0)
