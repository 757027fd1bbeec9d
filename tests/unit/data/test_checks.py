"""Findings: each by a direct count over the rows, in places a reader can go to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.prepare.checks import (
    Finding,
    check_leakage,
    check_mixture,
    check_row_count,
    check_table,
    find_repeats,
)
from trainer.data.prepare.encode import DOUBLE_BOS, NO_END, ROW_STATS, TRUNCATED
from trainer.data.prepare.rejections import MESSAGES, RejectionCounter
from trainer.data.sources.rows import RejectedRow


def stats(rows: int, **columns: Any) -> np.ndarray:
    """Rows that differ in everything, but for what is said."""
    out = np.zeros(rows, dtype=ROW_STATS)
    out["line"] = np.arange(rows) + 1
    for name in ("prefix_hash", "row_hash", "reply_hash", "text_hash"):
        out[name] = np.arange(rows) * 7919
    for name, values in columns.items():
        out[name] = values
    return out


def found(table: np.ndarray) -> dict[str, Finding]:
    findings = check_table(table, lambda row: f"{'ab'[table['file'][row]]}.jsonl:{table['line'][row]}")
    return {finding.kind: finding for finding in findings}


pairs = st.lists(st.tuples(st.integers(-3, 3), st.integers(-2, 2)), max_size=40)


@settings(max_examples=100, deadline=None)
@given(pairs)
def test_repeats_against_a_loop_over_the_rows(rows: list[tuple[int, int]]) -> None:
    prompts, answers = (np.asarray([r[i] for r in rows], dtype=np.int64) for i in (0, 1))
    same, other = find_repeats(prompts, answers, answers)
    first: dict[int, int] = {}
    for i, (prompt, answer) in enumerate(rows):
        assert same[i] == ((prompt, answer) in rows[:i])
        assert other[i] == ((prompt, answer) not in rows[:i] and answer != first.setdefault(prompt, answer))


def test_nothing_is_found_in_clean_rows() -> None:
    assert found(stats(0)) == {}
    assert found(stats(50)) == {}


def test_repeated_rows_and_other_answers_are_named() -> None:
    table = stats(9, prefix_hash=[1, 2, 1, 1, 3, 3, 3, 4, 5], row_hash=[1, 1, 1, 2, 5, 6, 6, 7, 8])
    table["reply_hash"] = table["row_hash"]
    names = found(table)
    assert (names["duplicate"].count, names["duplicate"].where) == (2, ("a.jsonl:3", "a.jsonl:7"))
    assert (names["other_answer"].count, names["other_answer"].where) == (2, ("a.jsonl:4", "a.jsonl:6"))
    assert names["duplicate"].level == names["other_answer"].level == "warning"
    assert names["duplicate"].message.endswith("in 2 rows → remove them")
    table["reply_hash"][5] = 5  # a chat that goes on otherwise after the same first answer
    assert found(table)["other_answer"].where == ("a.jsonl:4",)
    many = found(stats(30, prefix_hash=1, row_hash=1, reply_hash=1))
    assert (many["duplicate"].count, len(many["duplicate"].where)) == (29, 5)


@pytest.mark.parametrize(
    ("bit", "kind", "level"),
    [(NO_END, "no_end_token", "warning"), (DOUBLE_BOS, "double_bos", "warning"), (TRUNCATED, "truncated", "note")],
)
def test_flags(bit: int, kind: str, level: str) -> None:
    table = stats(6, flags=[0, bit, 7 - bit, 7, 0, 0], file=[0, 0, 0, 1, 1, 1])
    assert found(table)[kind].where == ("a.jsonl:2", "b.jsonl:4")
    assert found(table)[kind].level == level
    assert kind not in found(stats(6, flags=7 - bit))


def test_one_class_is_found_by_file_and_only_in_short_answers() -> None:
    mostly = np.concatenate([np.zeros(46), np.arange(4) + 1])
    table = stats(100, text_hash=np.concatenate([mostly, np.arange(50)]), file=np.repeat([0, 1], 50), answer_length=3)
    finding = found(table)["one_class"]
    assert (finding.count, finding.where[0]) == (46, "a.jsonl:1")
    assert "one and the same answer, of 50" in finding.message
    assert "one_class" not in found(stats(50, text_hash=np.concatenate([np.zeros(45), np.arange(5) + 1])))
    assert "one_class" not in found(stats(50, text_hash=1, answer_length=33))
    assert "one_class" not in found(stats(19, text_hash=1))


def test_refused_rows_are_counted_by_reason() -> None:
    rows = [RejectedRow(f"a:{i}", "null" if i % 3 else "too_long", "is", "raw") for i in range(12)]
    for on_too_long, level, numbers in (("error", "refused", (12, 0)), ("drop", "left_out", (8, 4))):
        counter = RejectionCounter(on_too_long)
        counter.add(rows[:5])
        counter.add(rows[5:])
        assert (counter.refused, counter.dropped) == numbers
        null, too_long = counter.findings()
        assert (null.kind, null.level, null.count) == ("null", "refused", 8)
        assert (too_long.kind, too_long.level, too_long.count) == ("too_long", level, 4)
        assert null.where == ("a:1", "a:2", "a:4", "a:5", "a:7")
    assert all("→" in f.message for f in counter.findings())
    assert "control_token" in MESSAGES


def test_a_leak_names_the_held_out_rows() -> None:
    held = np.asarray([[9, 4, 5, 1], [0, 0, 7, 0]])
    (finding,) = check_leakage(np.asarray([[1, 2, 3, 4], [7, 8, 8, 8]]), held, lambda row: f"held.jsonl:{row + 1}")
    assert (finding.kind, finding.level, finding.count) == ("leak", "warning", 3)
    assert finding.where == ("held.jsonl:2", "held.jsonl:3", "held.jsonl:4")
    assert check_leakage(np.asarray([[7], [9]]), held, str) == []


def test_few_rows() -> None:
    assert check_row_count(100) == []
    assert check_row_count(99)[0].count == 99


def test_rows_of_an_earlier_part_are_named() -> None:
    hashes = np.asarray([1, 2, 2, 3, 1, 4, 4], dtype=np.int64)
    (finding,) = check_mixture(hashes, np.asarray([0, 3, 6, 7]), str)
    assert (finding.kind, finding.level, finding.where) == ("duplicate", "warning", ("4", "6"))
    assert check_mixture(hashes, np.asarray([0, 7]), str) == []
    assert check_mixture(np.arange(7), np.asarray([0, 3, 6, 7]), str) == []
