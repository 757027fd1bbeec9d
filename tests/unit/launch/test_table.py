"""Tables from records: what each value looks like, and the three forms of a table."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from launch.table import Column, show_records, write

COLUMNS = [Column("name", "the name"), Column("loss", "loss", ".4f"), Column("bytes", "saved", ",.1f", " MiB", 2**20)]
RECORDS: list[dict[str, Any]] = [
    {"name": "a|b", "loss": 0.123456, "bytes": 3 * 2**30, "error": None, "tried": {}},
    {"name": "c", "loss": float("nan"), "bytes": None, "error": "row 3 | is empty", "tried": {"0.1": None}},
]


@pytest.mark.parametrize(
    ("value", "column", "text"),
    [
        (None, Column("x", "x", ".4f", " MiB"), "-"),
        (12345, Column("x", "x"), "12345"),
        (12345, Column("x", "x", ","), "12,345"),
        (32.0, Column("x", "x"), "32"),
        (2e-5, Column("x", "x"), "2e-05"),
        (1, Column("x", "x", ".4f"), "1.0000"),
        (True, Column("x", "x", ".4f"), "True"),
        ("8", Column("x", "x", ".4f"), "8"),
        (float("nan"), Column("x", "x", ".4f"), "nan"),
        (5.0, Column("x", "x", ".2f", " %"), "5.00 %"),
        (3 * 2**19, Column("x", "x", ".2f", " MiB", 2**20), "1.50 MiB"),
    ],
)
def test_a_value_as_text(value: Any, column: Column, text: str) -> None:
    assert column.cell({"x": value}) == text


def test_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show_records(RECORDS, COLUMNS, lambda _: "red")
    assert capsys.readouterr().out == (
        "the name  loss    saved\n"
        "a|b       0.1235  3,072.0 MiB\n"
        "c         nan     -\n"
    )  # fmt: skip


def test_files(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "found.x", RECORDS, COLUMNS, ["a note"])
    with (tmp_path / "deep" / "found.x.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert first == {"name": "a|b", "loss": "0.123456", "bytes": str(3 * 2**30), "error": "", "tried": "{}"}
    assert (second["error"], second["tried"]) == ("row 3 | is empty", '{"0.1": null}')
    assert (tmp_path / "deep" / "found.x.md").read_text() == (
        "| the name | loss | saved |\n"
        "| --- | --- | --- |\n"
        "| a\\|b | 0.1235 | 3,072.0 MiB |\n"
        "| c | nan | - |\n"
        "\n"
        "- a note\n"
    )  # fmt: skip
    write(tmp_path / "deep" / "found.x", RECORDS[:1], COLUMNS)
    assert len((tmp_path / "deep" / "found.x.md").read_text().splitlines()) == 3
