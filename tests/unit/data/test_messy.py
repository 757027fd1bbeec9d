"""What users really send: each row of a file ends as its own field ``expect`` says, whatever is done with long ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.prepared_data import Asked
from trainer.data.prepare.table import PreparedTable

MESSY = Path(__file__).with_name("messy.jsonl")
LONG = b"a b " * 50_000
# By the words of `expect`; of a line that is no JSON, by its text.
REASONS = {
    "refuse: empty output": "empty_answer",
    "refuse: output is null": "null",
    "refuse: output has type list": "wrong_type",
    "refuse: no output field": "missing_field",
    "refuse: lone surrogate": "lone_surrogate",
}


@pytest.fixture(scope="module")
def lines() -> list[bytes]:
    return MESSY.read_bytes().replace(b"@LONG@", LONG).split(b"\n")


def outcomes(found: PreparedTable) -> dict[int, str]:
    """Line -> ``kept`` or the reason why not."""
    out = {record["line"]: "kept" for record in found.table}
    for row in map(json.loads, found.refused_file.read_text().splitlines()):
        line = int(row["where"].removeprefix("rows.jsonl:"))
        assert line not in out
        out[line] = row["reason"]
    return out


def expected(line: bytes) -> str | None:
    if not line.strip():
        return None
    try:
        expect = json.loads(line.decode("utf-8-sig"))["expect"]
    except ValueError:
        return "broken_json"
    if expect.startswith("too long"):
        return "too_long"
    return "kept" if expect.startswith("keep") else REASONS[expect]


@pytest.mark.parametrize(("how", "refused", "dropped"), [("error", 9, 0), ("drop", 8, 1), ("truncate", 9, 0)])
def test_every_row_ends_as_it_says(asked: Asked, lines: list[bytes], how: str, refused: int, dropped: int) -> None:
    asked.path.write_bytes(b"\n".join(lines))
    found = asked(on_too_long=how)
    wanted = {number: expected(line) for number, line in enumerate(lines, 1)}
    assert outcomes(found) == {number: outcome for number, outcome in wanted.items() if outcome}
    assert (found.refused, found.dropped, found.truncated) == (refused, dropped, 0)  # its answer alone is too long
    by_kind = {finding.kind: finding for finding in found.findings}
    for kind, words in (("duplicate", "warn duplicate"), ("other_answer", "warn same prompt, other answer")):
        (number,) = (n for n, line in enumerate(lines, 1) if words.encode() in line)
        assert by_kind[kind].where == (f"rows.jsonl:{number}",)
    assert by_kind["too_long"].level == ("left_out" if how == "drop" else "refused")


def test_text_is_kept_as_it_is(asked: Asked, lines: list[bytes]) -> None:
    asked.path.write_bytes(b"\n".join(lines))
    table = {record["line"]: record for record in asked().table}
    for number, line in enumerate(lines, 1):
        if number in table:
            row = json.loads(line.decode("utf-8-sig"))
            assert table[number]["answer"] == row["output"]
            text = asked.tokenizer.decode(table[number]["input_ids"])
            assert row["instruction"] in text
            assert text.count("<|im_end|>") == 2 + row["output"].count("<|im_end|>")
            assert table[number]["input_ids"].count(asked.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
