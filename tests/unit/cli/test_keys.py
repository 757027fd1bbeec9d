"""``afina config --keys``: every key with its default and meaning, looked up by words, in 80 columns."""

from __future__ import annotations

import pytest

import trainer.cli.app
from trainer.cli.keys import explain, find_keys
from trainer.config import keys as every_key
from trainer.errors import ConfigError

Capture = pytest.CaptureFixture[str]


def test_keys_are_all_there_with_their_meaning(capsys: Capture) -> None:
    assert trainer.cli.app.main(["config", "--keys"]) == 0
    shown = capsys.readouterr().out
    heads = [line.partition(" = ") for line in shown.splitlines() if not line.startswith(" ")]
    assert [name for name, _, _ in heads] == [key.name for key in every_key()]
    assert "null means 2 * r" in shown
    assert "checkpoint.every_steps = 100\n" in shown
    assert "data.path = required\n" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize("width", [80, 60, 132])
def test_it_fits_the_width(width: int, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert trainer.cli.app.main(["config", "--keys"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > width] == []
    assert max(map(len, lines)) > width - 8  # and uses it


def test_eighty_columns_where_none_are_known(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert trainer.cli.app.main(["config", "--keys", "learning"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("optim.learning_rate = null\n    peak rate; null: the method's default")
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(
    ("words", "first", "others"),
    [
        (["learning"], "optim.learning_rate", {"compare.tune"}),  # one by its name, one by its meaning
        (["LEARNING", "rate"], "optim.learning_rate", {"compare.tune"}),
        (["method.alpha"], "method.alpha", set()),
        (["method.r=8"], "method.r", set()),  # as it is typed elsewhere
        (["checkpoint", "keep"], "checkpoint.keep", set()),
    ],
)
def test_words_are_looked_up_in_names_and_meanings(words: list[str], first: str, others: set[str]) -> None:
    found = [key.name for key in find_keys(words)]
    assert found[0] == first
    assert others <= set(found)
    assert len(found) < 20


def test_an_options_group_is_listed_first(capsys: Capture) -> None:
    assert trainer.cli.app.main(["config", "--keys", "rank"]) == 0
    assert capsys.readouterr().out.startswith("rank=large|medium|small|tiny\n")


@pytest.mark.parametrize(
    ("word", "near"),
    [("lerning", "optim.learning_rate"), ("optim.lr_rate", "optim."), ("warmup_step", "schedule.warmup_steps")],
)
def test_a_word_that_nothing_holds_leads_to_what_is_near(word: str, near: str) -> None:
    try:
        hint = f"did you mean {find_keys([word])[0].name}"
    except ConfigError as error:
        hint = error.hint
    assert "did you mean" in hint
    assert near in hint


def test_nothing_is_near(capsys: Capture) -> None:
    assert trainer.cli.app.main(["config", "--keys", "zzzzzz"]) == 2
    assert "→ `afina config --keys` lists all" in capsys.readouterr().err


def test_a_long_default_is_wrapped_at_its_commas() -> None:
    [key] = [key for key in every_key() if key.name == "compare.methods"]
    text = explain(key, 80)
    assert text.startswith("compare.methods = [full,")
    assert max(map(len, text.splitlines())) <= 80
    assert "qlora_8bit" in text
