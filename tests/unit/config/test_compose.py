"""The configuration composes, round-trips, names runs and expands sweeps."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import (
    TrainConfig,
    conf_dir,
    expand_sweep,
    groups,
    is_sweep,
    keys,
    load,
    method_label,
    run_name,
    sources,
    to_yaml,
)
from trainer.config.method import METHODS

YAMLS = sorted(conf_dir().rglob("*.yaml"))
# The one file of each group that lists every key with its meaning, whether or not it is at its default.
MENUS = {
    "model": "smollm2_135m",
    "method": "lora",
    "data": "alpaca",
    "zero": "stage2",
    "optim": "default",
    "schedule": "cosine",
    "log": "default",
    "launch": "slurm",
}
OPTIONS = [(group, option) for group, options in groups().items() for option in options]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data file; what is in it does not matter to the configuration."""
    file = tmp_path_factory.mktemp("data") / "my rows.jsonl"
    file.write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    return file


@pytest.fixture
def data(rows: Path) -> str:
    return f"data.path='{rows}'"


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=[f"{group}={option}" for group, option in OPTIONS])
def test_every_option_composes(group: str, option: str, data: str) -> None:
    config = load([f"{group}={option}", data])
    assert isinstance(config, TrainConfig)
    assert sources([f"{group}={option}"])[group] == str(conf_dir() / group / f"{option}.yaml")


def test_the_groups_are_those_that_docs_and_scripts_rely_on() -> None:
    expected = "data, debug, experiment, launch, log, method, model, optim, rank, schedule, sweep, zero"
    assert ", ".join(groups()) == expected
    assert groups()["zero"] == ("stage0", "stage1", "stage2", "stage2_offload", "stage3", "stage3_offload")
    assert set(groups()["method"]) == {
        *("full", "lora", "qlora", "qlora_8bit", "dora", "rslora", "experts"),
        *("adalora", "ia3", "prompt", "prefix", "bottleneck"),
    }


@pytest.mark.parametrize("recipe", groups()["experiment"])
@pytest.mark.parametrize("shrink", groups()["debug"])
def test_every_recipe_can_be_shrunk(recipe: str, shrink: str, data: str) -> None:
    config = load([f"experiment={recipe}", f"debug={shrink}", data])
    assert config.data.max_rows is not None
    assert config.data.max_rows <= 64
    assert config.run.name is None
    if shrink == "tiny":
        assert (config.model.name_or_path, config.model.dtype, config.batch.max_steps) == ("tiny", "fp32", 8)


@pytest.mark.parametrize("file", YAMLS, ids=[str(file.relative_to(conf_dir())) for file in YAMLS])
def test_every_yaml_key_is_commented(file: Path) -> None:
    lines = file.read_text().splitlines()
    assert lines[0].startswith("#"), "a file opens with what it is for"
    for number, line in enumerate(lines):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        opens_a_section = text.endswith(":")
        assert opens_a_section or re.search(r"\s# \S", line), f"{file.name}:{number + 1} has no comment: {line}"
        assert "${now:" not in line, "a clock differs between ranks and restarts"


@pytest.mark.parametrize("recipe", groups()["experiment"] + groups()["debug"])
def test_recipes_open_with_their_launch_command(recipe: str) -> None:
    group = "experiment" if recipe in groups()["experiment"] else "debug"
    first, second = (conf_dir() / group / f"{recipe}.yaml").read_text().splitlines()[:2]
    assert first == "# @package _global_"
    assert re.match(r"# (afina train|torchrun|sbatch) ", second)
    assert f"{group}={recipe}" in second


def test_yaml_says_what_the_schema_says() -> None:
    """With no choice made, the files give the schema's own defaults, but for what has none there."""
    config = dataclasses.asdict(load())
    for key in keys():
        section, name = key.name.split(".")
        if key.name in ("method.r", "data.path"):
            continue
        assert config[section][name] == key.default, key.name
    assert config["method"]["r"] == 16
    assert config["data"]["path"].endswith("examples/headlines/headlines.jsonl")


def written_keys(group: str, option: str) -> dict[str, Any]:
    """``{dotted key: value}`` of one option's file, without what it takes from others."""
    tree = yaml.safe_load((conf_dir() / group / f"{option}.yaml").read_text()) or {}
    tree.pop("defaults", None)
    section = "method" if group == "rank" else group
    whole = tree if group in ("experiment", "debug") else {section: tree}
    return {f"{name}.{key}": value for name, body in whole.items() for key, value in body.items()}


def also(option: str) -> set[str]:
    """The keys that the file of a method names beside those that it sets."""
    lines = (conf_dir() / "method" / f"{option}.yaml").read_text().splitlines()
    return {f"method.{key}" for line in lines if line.startswith("# Also: ") for key in line[8:].split(", ")}


def test_every_key_is_documented_and_in_a_yaml() -> None:
    written = {key for group, option in OPTIONS for key in written_keys(group, option)}
    written |= {key for option in groups()["method"] for key in also(option)}
    for name, body in yaml.safe_load((conf_dir() / "train.yaml").read_text()).items():
        written |= {f"{name}.{key}" for key in body} if isinstance(body, dict) else set()
    for key in keys():
        assert len(key.help) > 5, key.name
        assert key.type, key.name
        assert key.name in written, f"{key.name} is in no file of conf/"


def test_one_file_a_group_lists_every_key_of_it() -> None:
    for group, option in MENUS.items():
        every = {key.name for key in keys() if key.name.startswith(f"{group}.")}
        if group == "method":
            every = {f"method.{key}" for key in METHODS["lora"].keys | {"name"}}
        assert set(written_keys(group, option)) == every, group


def test_the_file_of_a_method_names_every_key_that_it_has() -> None:
    of_4_bits = {"quant_type", "double_quant", "compute_dtype", "quant_storage"}
    for method in METHODS.keys() - {"lora"}:
        every = {f"method.{key}" for key in METHODS[method].keys - of_4_bits | {"name"}}
        assert set(written_keys("method", method)) | also(method) == every, method


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=[f"{group}={option}" for group, option in OPTIONS])
def test_a_file_holds_only_what_differs_from_the_schema(group: str, option: str) -> None:
    """The schema says the defaults. An experiment may set one back where an option that could be chosen beside it sets
    another value; debug=… shrinks whatever was chosen, a recipe of the user's own too."""
    if group == "debug" or MENUS.get(group) == option:
        return
    defaults = {key.name: key.default for key in keys()}
    others = [written_keys(*other) for other in OPTIONS if group == "experiment" and other[0] != "debug"]
    for key, value in written_keys(group, option).items():
        set_back = any(file.get(key, value) != value for file in others)
        assert value != defaults[key] or set_back, f"{key}: {value} is the default"


def test_what_is_typed_wins_over_recipes_and_the_last_choice_counts() -> None:
    assert load(["experiment=demo", "rank=large", "optim=conservative"]).optim.learning_rate == 1e-4
    assert load(["experiment=demo", "rank=large"]).method.r == 64
    assert load(["experiment=demo", "method=full", "rank=null"]).method.r is None
    assert load(["rank=large", "method=qlora", "method.r=3"]).method.r == 3
    assert load(["rank=large", "rank=tiny"]).method.r == 8
    assert load(["experiment=demo", "experiment=null"]).run.name is None


def test_rank_alone_keeps_alpha_following_it() -> None:
    for rank in groups()["rank"]:
        assert load([f"rank={rank}"]).method.alpha is None
    assert load(["method.r=32"]).method.alpha is None


def test_methods_and_their_labels() -> None:
    for label in groups()["method"]:
        assert method_label(load([f"method={label}"])) == label
    assert method_label(load(["method=ia3", "method.bits=4"])) == "ia3_4bit"


def test_raw_deepspeed_keys_need_no_plus() -> None:
    typed = ["zero.extra.zero_optimization.overlap_comm=true", "+zero.extra.steps_per_print=5", "++method.r=4"]
    config = load(typed)
    assert config.zero.extra == {"zero_optimization": {"overlap_comm": True}, "steps_per_print": 5}
    assert config.method.r == 4


def test_a_text_is_kept_as_typed() -> None:
    config = load(["model.revision=12345e7", "run.name=007", "log.group=true", "log.tags=[a,b]"])
    assert (config.model.revision, config.run.name, config.log.group) == ("12345e7", "007", "true")
    assert config.log.tags == ["a", "b"]


def test_data_is_found_from_the_working_directory_then_beside_conf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = conf_dir().parent / "examples/headlines/headlines.jsonl"
    assert load().data.path == str(shipped)
    (tmp_path / "examples/headlines").mkdir(parents=True)
    own = tmp_path / "examples/headlines/headlines.jsonl"
    own.write_text("{}\n")
    config = load(["data.validation=examples/headlines/headlines.jsonl"])
    assert config.data.path == config.data.validation == str(own)


def test_environment_variables_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFINA_TEST_RUNS", "/scratch/runs")
    assert load(["run.dir=${oc.env:AFINA_TEST_RUNS}/x"]).run.dir == "/scratch/runs/x"


def test_composing_leaves_another_hydra_user_a_clean_state() -> None:
    from hydra.core.global_hydra import GlobalHydra

    load()
    assert not GlobalHydra.instance().is_initialized()


NAMES = st.text(st.sampled_from("abcXYZ019_-. #:'\"\\{}[],%@!&*|>é "), min_size=1, max_size=20)


@settings(max_examples=15, deadline=None)
@given(
    rank=st.one_of(st.none(), st.integers(1, 4096)),
    rate=st.one_of(st.none(), st.floats(1e-9, 10.0)),
    validation=st.one_of(st.integers(0, 10**6), st.floats(0.001, 0.999)),
    texts=st.lists(NAMES, max_size=3),
    wandb=st.sampled_from(["auto", "online", "offline", "off"]),
    modules=st.sampled_from(["all_linear", "attention", ["q_proj"], ["q_proj", "v_proj"]]),
)
def test_yaml_round_trip(tmp_path_factory, rank, rate, validation, texts, wandb, modules) -> None:  # type: ignore[no-untyped-def]
    config = load(["method=full"] if rank is None else [f"method.r={rank}"])
    config.optim.learning_rate, config.data.validation = rate, validation
    config.log.tags, config.log.wandb, config.log.group = texts, wandb, texts[0] if texts else None
    config.zero.extra = {"a": {"b": texts, "c": 1e-8}}
    if rank is not None:
        config.method.target_modules = modules
    file = tmp_path_factory.mktemp("run") / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    again = load([], config_file=file)
    assert again == config
    assert run_name(again) == run_name(config)
    assert load(["method.alpha=3"] if rank else ["run.seed=3"], config_file=file) != config


def test_overrides_apply_on_top_of_a_config_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(load(["experiment=demo", "run.seed=5"])))
    config = load(["method.r=4", "zero.extra.steps_per_print=5"], config_file=file)
    assert (config.method.r, config.run.seed, config.batch.global_size) == (4, 5, 16)
    assert config.zero.extra == {"steps_per_print": 5}


def test_secrets_are_redacted() -> None:
    config = load(["run.name=plain"])
    config.log.entity = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345"
    config.model.name_or_path = "https://me:pa55@hub.example/org/model"
    config.zero.extra = {"x": {"api_key": "k3y", "wandb_token": "t0k", "password": "p4ss", "max_tokens": 5}}
    config.log.tags = ["s3://id:s3cret@bucket/x", "/data/hf_checkpoints/llama"]
    text = to_yaml(config)
    for secret in ("hf_Ab", "pa55", "k3y", "t0k", "p4ss", "s3cret"):
        assert secret not in text
    for kept in (
        "micro_tokens: 4096",
        "max_new_tokens: 64",
        "max_tokens: 5",
        "hub.example/org/model",
        "hf_checkpoints",
    ):
        assert kept in text


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=3, unique=True), min_size=1, max_size=3))
def test_sweeps_are_every_combination_in_the_order_typed(axes: list[list[int]]) -> None:
    names = ["method.r", "method.alpha", "run.seed"]
    typed = [f"{name}={','.join(map(str, axis))}" for name, axis in zip(names, axes, strict=False)]
    runs = expand_sweep(typed)
    expected: list[list[str]] = [[]]
    for name, axis in zip(names, axes, strict=False):
        expected = [[*run, f"{name}={value}"] for run in expected for value in axis]
    assert runs == expected
    assert is_sweep(typed) == any(len(axis) > 1 for axis in axes)
    assert not any(is_sweep(run) for run in runs)


def test_sweep_forms() -> None:
    assert expand_sweep(["method.r=range(1,4)"]) == [["method.r=1"], ["method.r=2"], ["method.r=3"]]
    assert expand_sweep(["rank=choice(tiny,large)", "run.seed=1"]) == [
        ["rank=tiny", "run.seed=1"],
        ["rank=large", "run.seed=1"],
    ]
    assert expand_sweep(["method.target_modules=[q_proj,v_proj],all_linear"]) == [
        ["method.target_modules=[q_proj,v_proj]"],
        ["method.target_modules=all_linear"],
    ]
    assert expand_sweep([]) == [[]]
    assert not is_sweep(["method.target_modules=[q,v]", "log.group='a,b'"])


def test_a_made_name_tells_model_and_method_and_a_typed_one_is_kept(data: str) -> None:
    name = run_name(load(["model=qwen2_5_7b", "method=qlora", data]))
    assert re.fullmatch(r"qwen2-5-7b-qlora-[0-9a-f]{8}", name)
    assert run_name(load(["run.name=mine"])) == "mine"


@settings(max_examples=40, deadline=None)
@given(model=st.text(min_size=1, max_size=60))
def test_a_made_name_is_a_plain_folder_name(model: str) -> None:
    config = TrainConfig()
    config.model.name_or_path = model
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]*-lora-[0-9a-f]{8}", run_name(config))
