"""A config file from somebody else gives values: it neither reads this machine, nor runs code, nor moves folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.checkpoint.config_history import read_config
from trainer.config import load, to_yaml
from trainer.config.suggestions import config_fields
from trainer.errors import ConfigError


def written(folder: Path, section: str, key: str, value: object) -> Path:
    """A complete config file with one value of its own."""
    tree = yaml.safe_load(to_yaml(load(["run.name=theirs"])))
    tree[section][key] = value
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model", "name_or_path", "x/${oc.env:AWS_SECRET_ACCESS_KEY}"),
        ("log", "project", "${oc.env:HOME}"),
        ("log", "tags", ["plain", "${ oc.env : HOME }"]),
        ("zero", "extra", {"deep": {"${oc.env:HOME}": 1}}),
        ("data", "path", "${oc.decode:${oc.env:HOME}}"),
        ("log", "group", "${oc.create:{a:1}}"),
    ],
)
def test_a_file_reads_nothing_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str, key: str, value: object
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    with pytest.raises(ConfigError, match=rf"^{section}\.{key}.*only conf/ and what is typed may") as error:
        load([], written(tmp_path, section, key, value), with_data=False)
    assert "planted" not in str(error.value)


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(["oc.env", "oc.decode", "oc.create", "oc.dict.keys", "now", "hydra", "mine"]), st.text(max_size=9)
)
def test_no_call_passes(tmp_path_factory: pytest.TempPathFactory, resolver: str, argument: str) -> None:
    file = written(tmp_path_factory.mktemp("theirs"), "log", "group", f"{argument}${{{resolver}:{argument}}}")
    with pytest.raises(ConfigError):
        load([], file, with_data=False)


def test_a_file_may_refer_to_itself_and_what_is_typed_to_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_GROUP", "mine")
    file = written(tmp_path, "log", "group", "${run.name}")
    assert load([], file, with_data=False).log.group == "theirs"
    assert load(["log.group=${oc.env:MY_GROUP}"], file, with_data=False).log.group == "mine"


def test_remote_code_is_granted_where_it_is_typed(tmp_path: Path) -> None:
    file = written(tmp_path, "model", "trust_remote_code", True)
    with pytest.raises(ConfigError, match=r"cannot grant that: run Python code.* → type model.trust_remote_code=true"):
        load([], file, with_data=False)
    assert load(["model.trust_remote_code=true"], file, with_data=False).model.trust_remote_code
    assert not load(["model.trust_remote_code=false"], file, with_data=False).model.trust_remote_code
    kept = read_config(tmp_path)  # compared with, not acted on
    assert kept is not None
    assert kept.model.trust_remote_code


def test_a_file_overwrites_nothing(tmp_path: Path) -> None:
    file = written(tmp_path, "run", "overwrite", True)
    assert not load([], file, with_data=False).run.overwrite
    assert load(["run.overwrite=true"], file, with_data=False).run.overwrite


def test_what_grants_is_marked() -> None:
    granting = {name for name, spec in config_fields().items() if spec.field.metadata["grants"]}
    assert granting == {"model.trust_remote_code", "run.overwrite", "checkpoint.trust_pickle"}
