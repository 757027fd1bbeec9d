"""``docs/config.md`` is what the schema says."""

from __future__ import annotations

from tests.helpers.processes import ROOT
from trainer.config import groups, keys
from trainer.config.reference import config_reference

PAGE = ROOT / "docs" / "config.md"


def test_the_page_is_up_to_date() -> None:
    same = PAGE.read_text(encoding="utf-8") == config_reference()
    assert same, "python -m trainer.config.reference > docs/config.md"


def test_every_key_has_one_row_of_six_cells() -> None:
    rows = [line for line in config_reference().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [key.name for key in keys()]
    assert {row.replace(r"\|", "").count("|") for row in rows} == {7}


def test_limits_defaults_and_marks_are_shown() -> None:
    page = config_reference()
    assert "| `method.dropout` | float | `0.0` | ≥ 0, < 1 | yes |" in page
    assert "| `data.path` | any | required |  | yes, fixed |" in page
    assert "| `batch.packing` | str | `auto` | auto, trie or padded | no |" in page
    assert "| `model.revision` | str \\| null | `null` |  | yes, fixed |" in page
    for group in set(groups()) - {"rank", "experiment", "debug"}:
        assert f"`{group}={groups()[group][0]}`" in page
