"""Sweeps expand as Hydra's own basic sweeper expands them."""

from __future__ import annotations

import random

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from trainer.config import expand_sweep, load
from trainer.config.sweep_axes import parse_axis
from trainer.errors import ConfigError

SWEEPS = [
    ["method.r=8,16"],
    ["method.r=8,16", "method.alpha=16,32,64"],
    ["method.r=8", "method.alpha=16"],
    ["debug=tiny", "method.r=4,8", "log=off"],
    ["rank=tiny,small,medium"],
    ["rank=choice(tiny,large)", "run.seed=1"],
    ["method.r=choice(8)"],
    ["method.r=choice(8,16,32)"],
    ["method.r=sort(choice(32,8,16))"],
    ["method.r=sort(32,8,16,reverse=true)"],
    ["method.r=range(1,4)"],
    ["method.r=range(4)"],
    ["method.r=range(4,20,4)"],
    ["method.r=range(start=2,stop=9,step=3)"],
    ["optim.weight_decay=range(0,1,0.25)"],
    ["optim.weight_decay=range(0.1,0.5,0.1)"],
    ["method.r=int(range(1.0,4.0))"],
    ["optim.learning_rate=1e-4,3e-4,1e-3"],
    ["optim.learning_rate=float(choice(1,2))"],
    ["method.r=shuffle(8,16,32,64)"],
    ["method.r=shuffle(range(1,9))", "method.alpha=shuffle(choice(1,2,3))"],
    ["method.r=tag(mine,choice(8,16))"],
    ["method.r=tag(a,b,range(1,4))"],
    ["method.target_modules=[q_proj,v_proj],all_linear"],
    ["method.target_modules=[q_proj],[v_proj]"],
    ["eval.metrics=[loss],[loss,exact_match]"],
    ["data.columns={instruction:question},{instruction:q,output:a}"],
    ["log.group='a,b','c d'"],
    ["log.group='it\\'s',plain"],
    ['run.dir="a b",c'],
    ["eval.before=true,false"],
    ["batch.max_steps=null,10"],
    ["log.name=null,'null'"],
    ["+zero.extra.x=1,2"],
    ["method.r=4,8", "method.alpha=8", "method.r=16,32"],
]


@pytest.mark.parametrize("typed", SWEEPS, ids=" ".join)
def test_the_trials_are_those_of_hydras_own_sweeper(typed: list[str]) -> None:
    state = random.getstate()
    random.seed(0)
    (hydras,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(typed), None)
    random.setstate(state)
    assert expand_sweep(typed) == hydras
    assert random.getstate() == state, "the sweep's seed is its own"


def test_the_seed_decides_a_shuffle() -> None:
    typed = ["method.r=shuffle(range(1,30))"]
    assert expand_sweep(typed, 3) == expand_sweep(typed, 3) != expand_sweep(typed, 4)
    assert sorted(expand_sweep(typed, 3)) == sorted(expand_sweep(typed, 4))


def test_hints_are_commands_that_work() -> None:
    """What is said of an interval can be typed."""
    for typed in ("optim.learning_rate=interval(1e-5,1e-3)", "method.r=int(interval(4,64))"):
        with pytest.raises(ConfigError) as refused:
            expand_sweep([typed])
        listed = refused.value.hint.rpartition(": ")[2]
        assert len(expand_sweep([listed])) == 3
        for (override,) in expand_sweep([listed]):
            load([override])
    axis = parse_axis("optim.learning_rate=tag(log, interval(1e-5, 1e-3))")
    assert axis.interval is not None
    assert axis.interval.examples() == ["1e-05", "0.0001", "0.001"]


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("sweep.trials=5", "as many trials as combinations"),
        ("sweep.parallel=0", "at least 1"),
        ("sweep.parallel=many", "auto or a whole number"),
        ("sweep.fuse=0", "sweep.fuse=off"),
        ("sweep.fuse=on", "auto, off or a whole number"),
        ("sweep.fuse=true", "auto, off or a whole number"),
        ("sweep.fuse=2.5", "auto, off or a whole number"),
        ("sweep.fuse=4 launch=slurm", "each trial is a job"),
        ("sweep.alpha_over_rank=[0]", "greater than 0"),
        ("sweep.metric=exact_match", "name it in eval.metrics"),
        ("sweep.metric=evalloss", "sweep.metric=eval_loss"),
        ("sweep.min_steps=5", "has no effect"),
        ("sweep.reduction_factor=2", "sweep.reduction_factor=3"),
        ("sweep.early_stopping=asha", "sweep.min_steps=20"),
        ("sweep.early_stopping=asha sweep.min_steps=5 sweep.sampler=tpe", "sweep.sampler=random"),
        ("sweep.sampler=bayes", "grid, random or tpe"),
    ],
)
def test_what_could_do_nothing_is_refused(typed: str, told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(typed.split())
    assert told in str(refused.value)
