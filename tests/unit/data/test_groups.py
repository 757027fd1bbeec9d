"""Rows that belong together fall on one side of the split, whatever the template makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.prepared_data import Asked
from tests.helpers.tokenizers import with_template, write_rows
from trainer.config import load
from trainer.data.load import inspect_data
from trainer.data.validation_split import join_groups, split_rows
from trainer.errors import DataError

# As reasoning models' templates do: the last answer begins otherwise than it does once another turn follows.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QUESTIONS = ("Which ferry is oldest?", "Who built it?", "Where?")


def exploded(conversations: int) -> list[dict[str, Any]]:
    """Conversations of three rounds, each as three rows: after the first, the second and the third round."""
    rows = []
    for number in range(conversations):
        messages = []
        for round_, question in enumerate(QUESTIONS):
            asked = f"{question} Number {number}" if not round_ else question
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": f"{number} {round_}"}]
            rows.append({"messages": list(messages), "document": f"d{number % 2}", "of": number})
    return rows


@pytest.fixture
def split(asked: Asked) -> Any:
    """Load rows of our own; returns the data, and what rows stand on each side."""

    def loads(rows: list[dict[str, Any]], *overrides: str, template: str | None = None) -> Any:
        write_rows(asked.path, rows)
        tokenizer = with_template(asked.tokenizer, template) if template else asked.tokenizer
        keys = ["model=tiny", "batch.global_size=1", f"data.path={asked.path}", f"data.cache_dir={asked.cache}"]
        data = inspect_data(load([*keys, *overrides]), tokenizer)
        sides = [
            [rows[row["line"] - 1] for row in side.examples(range(len(side)))] for side in (data.train, data.validation)
        ]
        return data, *sides

    return loads


@pytest.mark.parametrize("template", [None, THINKING])
@pytest.mark.parametrize("train_on", ["completion", "assistant", "last_assistant", "all"])
def test_a_conversation_that_was_exploded_by_turn(split: Any, template: str | None, train_on: str) -> None:
    for validation in ("0.1", "0.5"):
        keys = (f"data.train_on={train_on}", f"data.validation={validation}")
        _, train, held = split(exploded(10), *keys, template=template)
        assert len(held) == float(validation) * 30
        assert not {row["of"] for row in train} & {row["of"] for row in held}


def test_it_is_found_across_two_files(split: Any, tmp_path: Path) -> None:
    rows = exploded(4)
    held = write_rows(tmp_path / "held.jsonl", [row for row in rows if len(row["messages"]) == 4])
    data, *_ = split([row for row in rows if len(row["messages"]) == 6], f"data.validation={held}", template=THINKING)
    assert [(f.kind, f.count) for f in data.findings if f.kind == "leak"] == [("leak", 4)]


def test_by_a_column(split: Any) -> None:
    data, train, held = split(exploded(10), "data.validation=0.5", "data.group_by=document")
    assert {row["document"] for row in train} != {row["document"] for row in held}
    assert (len(train), len(held)) == (15, 15)
    assert not [f for f in data.findings if f.kind == "leak"]
    _, train, held = split(exploded(10), "data.validation=0.5", "data.group_by=of")
    assert not {row["of"] for row in train} & {row["of"] for row in held}


def test_equal_prompts_hold_out_none_and_that_is_said(split: Any) -> None:
    rows = [{"prompt": "Write a line.", "completion": f"line {i}", "id": i} for i in range(12)]
    data, train, held = split(rows, "data.validation=0.1")
    assert (len(train), len(held)) == (12, 0)
    (finding,) = (f for f in data.findings if f.kind == "few_held_out")
    assert finding.level == "warning"
    for said in ("0 rows are held out", "data.validation=0.1 of 12 rows", "all 12 begin with one prompt", "group_by"):
        assert said in finding.message
    for by in ("id", "row"):
        data, train, held = split(rows, "data.validation=0.25", f"data.group_by={by}")
        assert (len(train), len(held)) == (9, 3)
        assert not [f for f in data.findings if f.kind == "few_held_out"]
        assert [f.count for f in data.findings if f.kind == "leak"] == ([3] if by == "id" else [])


def test_a_share_of_too_few_rows_is_said(split: Any) -> None:
    data, *_ = split([{"prompt": f"{i}", "completion": "a"} for i in range(4)], "data.validation=0.1")
    (finding,) = (f for f in data.findings if f.kind == "few_held_out")
    assert "asks for 0" in finding.message
    data, *_ = split([{"prompt": f"{i}", "completion": "a"} for i in range(4)], "data.validation=0")
    assert not [f for f in data.findings if f.kind == "few_held_out"]


def test_a_column_that_is_not_there(split: Any) -> None:
    with pytest.raises(DataError, match=r"data\.group_by=doc: is no column of rows\.jsonl:1.*data\.group_by=document"):
        split(exploded(1), "data.group_by=doc")
    rows = [*exploded(1), {"messages": exploded(1)[0]["messages"], "document": None}]
    data, *_ = split(rows, "data.group_by=document", "data.max_refused=1")
    assert [f.kind for f in data.findings if f.level == "refused"] == ["null"]


hashes = st.lists(st.tuples(st.integers(-6, 6), st.integers(-6, 6)), max_size=40)


@settings(max_examples=200, deadline=None)
@given(hashes)
def test_groups_are_the_connected_rows(rows: list[tuple[int, int]]) -> None:
    prefix, opening = (np.asarray([row[i] for row in rows], dtype=np.int64) for i in (0, 1))
    found = join_groups(prefix, opening)
    groups = [{i} for i in range(len(rows))]
    for i in range(len(rows)):  # merge the groups of any two rows that share something
        for j in range(i):
            if rows[i][0] == rows[j][0] or rows[i][1] == rows[j][1]:
                both = groups[i] | groups[j]
                for k in both:
                    groups[k] = both
    for i in range(len(rows)):
        assert set(np.flatnonzero(found == found[i])) == groups[i]
        assert found[i] == min(rows[k][0] for k in groups[i])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-9, 9), min_size=5, max_size=40), st.integers(0, 9))
def test_the_split_stays_where_openings_join_nothing(prefixes: list[int], seed: int) -> None:
    """A run that was prepared before goes on."""
    prefix = np.asarray(prefixes, dtype=np.int64)
    opening = (prefix * 7919) ^ 5
    assert np.array_equal(join_groups(prefix, opening), prefix)
    now, before = (split_rows(by, 2, seed) for by in (join_groups(prefix, opening), prefix))
    assert all(np.array_equal(a, b) for a, b in zip(now, before, strict=True))
