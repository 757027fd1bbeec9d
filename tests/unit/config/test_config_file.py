"""A config file: a run's own takes the place of ``conf/``; one with a few keys and options starts from there."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.config import load, sources, to_yaml
from trainer.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    file = folder / "my.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("text", "same_as"),
    [
        ("method: {r: 32}\noptim: {learning_rate: 1e-4}\n", ["method.r=32", "optim.learning_rate=1e-4"]),
        ("method: qlora\n", ["method=qlora"]),
        ("experiment: demo\nrank: null\nrun: {name: mine}\n", ["experiment=demo", "rank=null", "run.name=mine"]),
        ("debug: tiny\nzero: {extra: {a: {b: 1}}}\n", ["debug=tiny", "zero.extra.a.b=1"]),
        ("zero: {stage: 3}\nbatch: {global_size: 4}\n", ["zero.stage=3", "batch.global_size=4"]),
    ],
)
def test_a_few_keys_start_from_the_defaults_of_the_groups(text: str, same_as: list[str], tmp_path: Path) -> None:
    assert load([], write(tmp_path, text)) == load(same_as)


@pytest.mark.parametrize(
    ("typed", "same_as"),
    [
        ("method.r=8", ["method.r=8", "method.bits=4"]),  # a key wins over the file
        ("rank=large", ["rank=large", "method.bits=4"]),  # so does an option, in what it sets
        ("method=dora", ["method=dora", "method.r=32", "method.bits=4"]),  # and the rest of the file stays
        ("model=tiny", ["model=tiny", "method.r=32", "method.bits=4"]),
        ("experiment=demo", ["experiment=demo", "method.bits=4"]),
    ],
)
def test_what_is_typed_wins_over_the_file(typed: str, same_as: list[str], tmp_path: Path) -> None:
    assert load([typed], write(tmp_path, "method: {r: 32, bits: 4}\n")) == load(same_as)


def test_an_option_wins_over_the_files(tmp_path: Path) -> None:
    file = write(tmp_path, "method: qlora\nmodel: tiny\n")
    assert load(["method=lora"], file) == load(["method=lora", "model=tiny"])
    assert sources(["method=lora"], file)["model"].endswith("conf/model/tiny.yaml")
    assert list(sources([], file).items())[-1] == ("on top", str(file))


def test_a_runs_file_needs_nothing_of_conf(tmp_path: Path) -> None:
    config = load(["experiment=demo", "method=dora", "method.r=3"])
    file = write(tmp_path, to_yaml(config))
    assert load([], file) == config
    assert sources([], file) == {"all": str(file)}
    older = "".join(line for line in to_yaml(config).splitlines(True) if "learning_rate" not in line)
    assert load([], write(tmp_path, older)).optim.learning_rate is None  # not that of the demo, nor of conf/


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("method:\n  r: 8\n\noptim:\n  learing_rate: 1e-4\n", "my.yaml:5: optim.learing_rate=0.0001: there is no such"),
        ("optim: {learing_rate: 1e-4}\n", "did you mean optim.learning_rate=0.0001"),
        ("run: {seed: 1}\nmethod: qlorra\n", "my.yaml:2: method=qlorra: must be one of adalora"),
        ("method: qlorra\n", "→ method=qlora"),
        ("metod: {r: 3}\n", "my.yaml:1: metod: there is no such section → method"),
        ("defaults: [{method: qlora}]\n", "choose an option as in `method: qlora`"),
        ("method.r: 8\n", "write `method: {r: 8}`"),
        ("rank: {r: 8}\n", "my.yaml:1: rank: is chosen by its name"),
        ("method: {r: abc}\n", "my.yaml:1: method.r=abc: must be a whole number"),
        ("batch: 3\n", "my.yaml:1: batch=3: must be a section with keys"),
        ("method:\n", "write its keys below method:"),
    ],
)
def test_a_mistake_is_told_with_its_line(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load([], write(tmp_path, text))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_option_that_the_file_undoes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"zero=stage2: .* sets zero\.stage on top → leave it out, or set zero\.stage"
    ):
        load(["zero=stage2"], write(tmp_path, "zero: {stage: 3}\n"))
