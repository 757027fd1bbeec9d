"""A global batch of more rows than there are is refused before anything is loaded, and only then."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.tokenizers import write_rows
from trainer.config import load
from trainer.config.rules.rows import check_row_count
from trainer.errors import ConfigError

ROW = {"instruction": "a", "output": "b"}


def check(rows: Path, *overrides: str) -> None:
    check_row_count(load(["model=tiny", f"data.path={rows}", *overrides]))


@pytest.mark.parametrize(
    ("rows", "overrides", "told"),
    [
        (7, ["batch.global_size=8", "data.validation=0"], "batch.global_size=8: is more than the 7 training rows"),
        (9, ["batch.global_size=8", "data.validation=2"], "2 of them held out → batch.global_size=7 or less"),
        (9, ["batch.global_size=8", "data.validation=0", "data.max_rows=4"], "data.max_rows=4"),
    ],
)
def test_too_few_rows(rows: int, overrides: list[str], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check(write_rows(tmp_path / "rows.jsonl", [ROW] * rows), *overrides)
    assert told in str(caught.value)


@pytest.mark.parametrize("validation", ["2", "0.2", "0"])
def test_enough_rows(validation: str, tmp_path: Path) -> None:
    check(write_rows(tmp_path / "rows.jsonl", [ROW] * 10), "batch.global_size=8", f"data.validation={validation}")


def test_what_lines_do_not_tell_is_left_to_the_preparation(tmp_path: Path) -> None:
    array = tmp_path / "rows.json"
    array.write_text("[]")
    check(array, "batch.global_size=8")
    # a row may become several
    rows = write_rows(tmp_path / "long.jsonl", [ROW] * 3)
    check(rows, "batch.global_size=8", "data.validation=0", "data.on_too_long=split")
    # more held out than there are has an error of its own
    check(write_rows(tmp_path / "rows.jsonl", [ROW] * 3), "batch.global_size=8", "data.validation=5")
