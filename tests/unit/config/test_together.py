"""Which runs are trained together: those that are alike in every key but the named ones, and never those that cannot
be. Properties hold for any runs; each refusal is tried."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import TrainConfig, load
from trainer.config.suggestions import config_fields
from trainer.config.together import NAMES, OWN_KEYS, Group, alike, group, why_alone

BASE = load(["debug=tiny"])


def with_values(config: TrainConfig, values: dict[str, Any]) -> TrainConfig:
    for name, value in values.items():
        section, key = name.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{key: value})})
    return config


runs = st.builds(
    with_values,
    st.just(BASE),
    st.fixed_dictionaries(
        {
            "method.r": st.integers(1, 64),
            "method.dora": st.booleans(),
            "method.init": st.sampled_from(["default", "gaussian", "pissa"]),
            "optim.learning_rate": st.none() | st.floats(1e-5, 1e-2),
            "batch.max_steps": st.none() | st.integers(1, 1000),
            "batch.global_size": st.sampled_from([4, 8]),
            "run.seed": st.sampled_from([0, 1]),
            "run.name": st.text("ab", min_size=1),
        }
    ),
)
fuses = st.sampled_from(["auto", "off"]) | st.integers(1, 5)


@given(st.lists(runs, max_size=40), fuses, st.integers(1, 4))
def test_each_run_is_in_one_group_of_runs_that_are_alike(
    configs: list[TrainConfig], fuse: str | int, at_once: int
) -> None:
    groups = group(configs, fuse, at_once)
    assert sorted(place for found in groups for place in found.places) == list(range(len(configs)))
    most = {"auto": 16, "off": 1}.get(str(fuse), fuse)
    for found in groups:
        assert len(found.places) <= int(most)
        assert list(found.places) == sorted(found.places)
        assert (found.alone is None) == (len(found.places) > 1)
        if len(found.places) > 1:
            assert len({alike(configs[place]) for place in found.places}) == 1
            assert {why_alone(configs[place]) for place in found.places} == {None}
        elif fuse not in ("off", 1) and (reason := why_alone(configs[found.places[0]])):
            assert found.alone == reason


@given(st.lists(runs, max_size=20), st.randoms())
def test_the_order_of_runs_changes_no_group_that_fits(configs: list[TrainConfig], random: Any) -> None:
    """As long as nobody is cut off by the limit, who is together depends on what the runs are alone."""
    order = list(range(len(configs)))
    random.shuffle(order)
    shuffled = group([configs[place] for place in order], 20)
    back = {frozenset(order[place] for place in found.places) for found in shuffled}
    assert back == {frozenset(found.places) for found in group(configs, 20)}


@given(st.integers(1, 100), fuses, st.integers(1, 8))
def test_a_kind_is_cut_into_as_few_groups_as_hold_it_and_as_many_as_there_are_devices(
    count: int, fuse: str | int, at_once: int
) -> None:
    sizes = [len(found.places) for found in group([BASE] * count, fuse, at_once)]
    most = int({"auto": 16, "off": 1}.get(str(fuse), fuse))
    assert len(sizes) == max(math.ceil(count / most), min(at_once, count))
    assert max(sizes) - min(sizes) <= 1


def other(name: str, value: Any) -> Any:
    """Return another value of a key, of whatever type."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, (int, float)) else "another"


@pytest.mark.parametrize("name", [name for name in config_fields() if "." in name])
def test_a_key_is_alike_unless_it_is_named(name: str) -> None:
    """Of every key of the schema: a new one is alike by default."""
    section, key = name.split(".")
    changed = with_values(BASE, {name: other(name, getattr(getattr(BASE, section), key))})
    may_differ = name in OWN_KEYS | NAMES or section in ("optim", "schedule", "sweep", "compare")
    assert (alike(changed) == alike(BASE)) == may_differ


def test_the_named_keys_are_keys() -> None:
    assert set(config_fields()) >= OWN_KEYS | NAMES


@pytest.mark.parametrize(
    ("typed", "reason"),
    [
        ("method=full rank=null", "method.name=full"),
        ("method=dora", "method.dora=true"),
        ("method.dropout=0.1", "method.dropout=0.1"),
        ("method=experts", "method.target_parameters"),
        ("method.bias=all", "method.bias=all"),
        ("method.init=pissa", "method.init=pissa"),
        ("method.init=olora", "method.init=olora"),
        ("model.neftune_alpha=5", "model.neftune_alpha=5"),
        ("optim.lora_plus_ratio=16", "optim.lora_plus_ratio=16"),
        ("optim.name=lion", "optim.name=lion"),
        ("model.dtype=fp16", "model.dtype=fp16"),
        ("model.compile=true", "model.compile=true"),
        ("zero=stage2_offload", "zero.offload_optimizer=cpu"),
        ("zero.stage=3 zero.offload_params=cpu", "zero.offload_params=cpu"),
        ("fault.non_finite=rewind", "fault.non_finite=rewind"),
        ("model.new_tokens=[quokka] method.trainable_tokens=new", "model.new_tokens: "),
        ("method.trainable_tokens=[no]", "method.trainable_tokens: "),
        ("method.modules_to_save=[lm_head]", "method.modules_to_save: "),
        ("launch=torchrun launch.nodes=2 launch.master_address=node0", "launch.nodes=2"),
    ],
)
def test_why_a_run_is_alone(typed: str, reason: str) -> None:
    config = load(["debug=tiny", *typed.split()])
    assert (why_alone(config) or "").startswith(reason)
    assert group([config, config], "auto") == [Group((0,), why_alone(config)), Group((1,), why_alone(config))]


@pytest.mark.parametrize("name", ["method.adapter", "checkpoint.resume"])
def test_what_begins_with_a_folder_is_alone(name: str) -> None:
    assert (why_alone(with_values(BASE, {name: "runs/a"})) or "").startswith(name)


def test_what_can_be_together() -> None:
    for typed in (
        "method.exclude_modules=[mlp]",
        "method.target_modules=.*q_proj",
        "method=qlora",
        "method=qlora_8bit",
        "method=rslora",
        "zero=stage3",
        "launch=torchrun",
    ):
        assert why_alone(load(["debug=tiny", typed])) is None


def test_one_without_others_is_told_what_it_has_of_its_own() -> None:
    apart = with_values(BASE, {"batch.global_size": 3, "run.seed": 4})
    assert group([BASE, apart, BASE], "auto") == [
        Group((0, 2)),
        Group((1,), "no other has its batch.global_size, run.seed"),
    ]
    assert group([BASE], "auto") == [Group((0,), "there is no other that could be trained with it")]
    assert [found.alone for found in group([BASE] * 2, "off")] == ["sweep.fuse=off"] * 2
