"""One mark on each field decides the run's name, what a checkpoint must match, and which finished run is the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from trainer.config import (
    changed_result_fields,
    groups,
    load,
    result_fields,
    run_identity,
    run_name,
    to_yaml,
)
from trainer.config.identity import saved_value
from trainer.config.method import METHODS
from trainer.config.suggestions import config_fields

SAME_RESULT = [
    "batch.micro_tokens=2048",
    "batch.micro_size=2",
    "batch.packing=padded",
    "zero=stage3",
    "zero=stage2_offload",
    "model.gradient_checkpointing=true",
    "model.gradient_checkpointing=selective",
    "model.kernels=none",
    "model.compile=true",
    "run.deterministic=true",
    "model.attention=eager",
    "model.trust_remote_code=true",
    "eval.every_steps=5",
    "eval.every_epoch=true",
    "eval.before=false",
    "eval.metrics=[loss,exact_match]",
    "eval.max_rows=7",
    "eval.overfit_gap=null",
    "generate.max_new_tokens=3",
    "data.workers=2",
    "data.max_refused=3",
    "data.cache_dir=/x",
    "checkpoint.every_steps=5",
    "checkpoint.resume=never",
    "log=offline",
    "log.group=x",
    "launch=torchrun",
    "compare.tune=[1]",
    "run.dir=/elsewhere",
    "run.overwrite=true",
]
OTHER_RESULT = [
    "method.r=17",
    "method.dropout=0.1",
    "method=qlora",
    "method=qlora method.compute_dtype=fp32",
    "model=tiny",
    "model.dtype=fp32",
    "run.seed=1",
    "batch.global_size=17",
    "batch.epochs=2",
    "batch.max_steps=3",
    "optim.learning_rate=1e-3",
    "schedule=linear",
    "data.max_rows=5",
    "data.max_length=512",
    "data.group_by=row",
    "zero.extra.communication_data_type=fp32",
    "eval.best_metric=eval_loss eval.every_steps=5",
    "eval.patience=2 eval.every_steps=5",
    "eval.stop_on_overfit=true eval.every_steps=5",
]


@pytest.mark.parametrize("typed", SAME_RESULT)
def test_how_a_run_is_carried_out_does_not_change_its_name(typed: str) -> None:
    before, now = load(), load([typed])
    assert before != now, "the override changes something"
    assert run_name(now) == run_name(before)
    assert changed_result_fields(before, now) == []
    assert run_identity(now, "f") == run_identity(before, "f")


def test_what_changes_the_result_changes_the_name() -> None:
    before = load()
    assert len({run_name(load(typed.split())) for typed in ["", *OTHER_RESULT]}) == len(OTHER_RESULT) + 1
    for typed in OTHER_RESULT:
        assert changed_result_fields(before, load(typed.split())), typed


def test_a_key_that_came_later_leaves_the_names_of_older_runs_alone() -> None:
    config = load()
    later = {name for name, spec in config_fields().items() if spec.field.metadata["newer"]}
    assert {"data.group_by", "data.template_kwargs"} <= later
    old = {name: value for name, value in result_fields(config).items() if name not in later}
    digest = hashlib.sha256(json.dumps(old, sort_keys=True, default=str).encode()).hexdigest()[:8]
    assert run_name(config).endswith(f"-{digest}")


def test_changed_fields_are_told_with_both_values() -> None:
    before = load(["method.r=8", "zero.extra.a=1", "data.columns={instruction: q}"])
    now = load(["method.r=16", "zero.extra.b.c=2", "data.columns={instruction: q}", "data.workers=3"])
    assert changed_result_fields(before, now) == [
        ("method.r", 8, 16),
        ("zero.extra.b.c", None, 2),
        ("zero.extra.a", 1, None),
    ]


def test_paths_of_the_checkout_are_the_same_in_every_checkout(tmp_path: Path) -> None:
    assert result_fields(load())["data.path"] == "examples/headlines/headlines.jsonl"
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(load()))
    assert changed_result_fields(load([], file), load()) == []


@pytest.mark.parametrize("option", groups()["method"])
def test_a_checkpoint_is_bound_to_what_its_tensors_mean(option: str) -> None:
    """The keys are those in the checkpoints of every version since 0.1, for an older one must go on being resumed; and
    newer ones, which have their default in it."""
    config = load([f"method={option}"])
    fixed = {
        "model.name_or_path",
        "model.revision",
        "model.new_tokens",
        "batch.global_size",
        "run.seed",
        "data",
        "method.name",
    }
    newer = {"optim.name": "adamw"}
    means = {f"method.{key}" for key in METHODS[config.method.name].keys - {"dropout"}}
    identity = run_identity(config, "fingerprint")
    assert set(identity) == fixed | means | set(newer)
    assert {name: saved_value({}, name) for name in newer} == newer
    assert saved_value({"optim.name": "lion"}, "optim.name") == "lion"
    assert saved_value({}, "method.r") is None
    assert identity["data"] == "fingerprint"
    assert identity["method.name"] == config.method.name


def test_a_resumed_run_may_change_the_length_and_the_rate_but_not_the_adapter() -> None:
    before = run_identity(load(), "f")
    for typed in (
        "batch.epochs=3",
        "optim.learning_rate=1",
        "schedule=linear",
        "method.dropout=0.1",
        "model.dtype=fp32",
    ):
        assert run_identity(load([typed]), "f") == before, typed
    for typed in ("method.r=3", "method.target_modules=attention", "run.seed=2", "batch.global_size=4", "model=tiny"):
        assert run_identity(load([typed]), "f") != before, typed
    assert run_identity(load(), "other") != before
    assert run_identity(load(["data.path=examples/medical/medical.jsonl"]), "f") == before, "the fingerprint says it"


def test_an_adapters_path_is_kept_as_it_was_in_older_checkpoints() -> None:
    config = load()
    config.method.adapter = str(Path(config.data.path).parents[2] / "runs/one/adapter")
    assert run_identity(config, "f")["method.adapter"] == config.method.adapter
    assert result_fields(config)["method.adapter"] == "runs/one/adapter"
