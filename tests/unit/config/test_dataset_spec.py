"""``data.path`` in all its forms, from the command line to parts and through a run's ``config.yaml``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import load, run_name, to_yaml
from trainer.config.dataset_spec import FIELDS, FORMATS, DatasetSpec, is_hub_id, parse_dataset_specs
from trainer.errors import ConfigError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a few files; what is in them does not matter here."""
    for name in ("a.jsonl", "b.csv", "deep/c.parquet", "my own.jinja", "t.J2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parts(path: Any, **group: Any) -> list[DatasetSpec]:
    return parse_dataset_specs(path, **{"format": "auto", "columns": {}, "split": "train", "revision": None, **group})


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("a.jsonl", "{here}/a.jsonl"),
        ("deep", "{here}/deep"),
        ("deep/", "{here}/deep"),
        ("'deep/*.parquet'", "{here}/deep/*.parquet"),
        ("'**/*.parquet'", "{here}/**/*.parquet"),
        ("owner/name", "owner/name"),
        ("[a.jsonl,b.csv]", ["{here}/a.jsonl", "{here}/b.csv"]),
        (
            "[{path: a.jsonl, weight: 2},{path: b.csv, rows: 100}]",
            [{"path": "{here}/a.jsonl", "weight": 2}, {"path": "{here}/b.csv", "rows": 100}],
        ),
        (
            "[a.jsonl, {path: deep/*.parquet, weight: 0.5, columns: {text: body}}, {path: o/n, split: s, revision: r}]",
            [
                "{here}/a.jsonl",
                {"path": "{here}/deep/*.parquet", "weight": 0.5, "columns": {"text": "body"}},
                {"path": "o/n", "split": "s", "revision": "r"},
            ],
        ),
    ],
)
def test_paths_from_the_command_line_survive_a_config_file(
    here: Path, typed: str, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def whole(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace("{here}", str(here))
        if isinstance(value, list):
            return [whole(item) for item in value]
        return {key: whole(item) for key, item in value.items()} if isinstance(value, dict) else value

    config = load([f"data.path={typed}"])
    assert config.data.path == whole(expected)
    file = here / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    monkeypatch.chdir(here.parent)
    again = load([], config_file=file)
    assert again == config
    assert run_name(again) == run_name(config)


def test_a_list_typed_over_a_config_file_takes_its_place(here: Path) -> None:
    file = here / "config.yaml"
    file.write_text(to_yaml(load(["data.path=[{path: a.jsonl, weight: 2},b.csv]", "data.validation=deep/*.parquet"])))
    config = load(["data.path=[b.csv]"], config_file=file)
    assert config.data.path == [str(here / "b.csv")]
    assert config.data.validation == str(here / "deep" / "*.parquet")
    assert load(["data.path=a.jsonl"], config_file=file).data.path == str(here / "a.jsonl")


def test_a_part_takes_from_the_group_what_it_does_not_say() -> None:
    group = {"format": "chat", "columns": {"messages": "m"}, "split": "test", "revision": "r"}
    own = {"path": "b", "format": "text", "columns": {}, "split": "s", "revision": None, "weight": 2}
    assert parts(["a", own], **group) == [
        DatasetSpec("a", "chat", {"messages": "m"}, 1.0, None, "test", "r"),
        DatasetSpec("b", "text", {}, 2.0, None, "s", None),
    ]
    assert parts("a", **group) == parts(["a"], **group) == [DatasetSpec("a", **group)]


VALUES = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=4) | st.just({"text": "t"})
GIVEN = st.dictionaries(st.sampled_from([*DatasetSpec.__slots__, "wieght"]) | st.text(max_size=3), VALUES, max_size=4)


@settings(max_examples=300, deadline=None)
@given(VALUES | st.lists(VALUES | GIVEN, max_size=3))
def test_anything_gives_parts_or_one_line(path: Any) -> None:
    try:
        found = parts(path)
    except ConfigError as error:
        message = str(error)
        assert message.startswith("data.")
        assert "\n" not in message
        assert ": " in message
        assert " → " in message
        return
    for part in found:
        assert part.path.strip()
        assert part.format in FORMATS
        assert part.weight > 0
        assert part.rows is None or part.rows > 0
        assert set(part.columns) <= FIELDS


def test_what_the_group_says_wrong_is_told_of_the_group() -> None:
    with pytest.raises(ConfigError, match=r"^data\.split="):
        parts(["a"], split="")
    with pytest.raises(ConfigError, match=r"^data\.path\[0\]\.split="):
        parts([{"path": "a", "split": ""}])


@pytest.mark.parametrize("path", ["owner/name", "own-er/na.me_2", "a1/b"])
def test_hub_ids(path: str) -> None:
    assert is_hub_id(path)
    assert load([f"data.path={path}"]).data.path == path


@pytest.mark.parametrize(
    "path", ["a", "a/b/c", "./a/b", "../no-such-place", "/a/b", "~/b", "a/b.jsonl", "a/B.CSV.GZ", "a/", "a b/c"]
)
def test_no_hub_ids(path: str) -> None:
    assert not is_hub_id(path)
    with pytest.raises(ConfigError, match="there is no such file"):
        load([f"data.path='{path}'"])


def test_a_missing_file_is_no_hub_id_and_a_near_one_is_named(here: Path) -> None:
    with pytest.raises(ConfigError, match=r"deep/d: there is no such file"):
        load(["data.path=deep/d"])
    with pytest.raises(ConfigError, match=r"→ data\.path\[1\]=deep/c\.parquet$"):
        load(["data.path=[a.jsonl,deep/c.parqet]"])
    with pytest.raises(ConfigError, match=r"→ data\.validation=a\.jsonl$"):
        load(["data.validation=a.json"])


def test_own_chat_templates(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(["data.template='my own.jinja'"]).data.template == str(here / "my own.jinja")
    config = load(["data.template=t.J2", "data.alpaca_role=system"])
    file = here / "config.yaml"
    file.write_text(to_yaml(config))
    monkeypatch.chdir(here.parent)
    assert load([], config_file=file) == config
    with pytest.raises(
        ConfigError, match=r"my owm\.jinja: there is no such file .* → 'data\.template=\".*my own\.jinja\"'$"
    ):
        load([f"data.template='{here}/my owm.jinja'"])


def test_columns() -> None:
    config = load(["data.columns={instruction: question, output: 'the answer'}"])
    assert config.data.columns == {"instruction": "question", "output": "the answer"}
    kwargs = load(["data.template_kwargs={enable_thinking: false}"]).data.template_kwargs
    assert kwargs == {"enable_thinking": False}
    config = load(["data.path=[{path: a.jsonl, columns: {text: body}},b.csv]", "data.columns={text: t}"])
    found = parts(config.data.path, columns=config.data.columns)
    assert [part.columns for part in found] == [{"text": "body"}, {"text": "t"}]


@pytest.mark.parametrize("option", ["alpaca", "chat", "text", "mixture"])
def test_groups_for_your_own_data_ask_for_a_path(option: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.path: must be given"):
        load([f"data={option}"])
    assert load([f"data={option}", "data.path=[a.jsonl]"]).data.train_on == (
        "all" if option == "text" else "completion"
    )
