"""Rows that are too long or cannot be used: cut as promised, or left out and written down."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.helpers.prepared_data import ROWS, Asked
from tests.helpers.tokenizers import adds_bos, write_rows
from trainer.data.formats.parse import parse_example
from trainer.data.prepare.length import fit_to_max_length
from trainer.data.sources.rows import Row, RowError
from trainer.data.templates.encoded import Encoded
from trainer.data.templates.template import Template
from trainer.errors import DataError


def test_too_long_is_refused(asked: Asked) -> None:
    every = asked()
    longest = int(max(every.lengths))
    assert len(asked(max_length=longest)) == len(ROWS)
    found = asked(max_length=longest - 1)
    (finding,) = (f for f in found.findings if f.level == "refused")
    assert (found.refused, found.dropped) == (finding.count, 0) == (len(ROWS) - len(found), 0)
    assert finding.where[0] == asked.refused(found)[0]["where"] == every.row_name(int(np.argmax(every.lengths)))
    assert f"is {longest} tokens long, over data.max_length={longest - 1}" in asked.refused(found)[0]["message"]


def test_too_long_is_left_out(asked: Asked) -> None:
    every = asked()
    limit = int(np.median(every.lengths))
    found = asked(max_length=limit, on_too_long="drop")
    kept = [i for i, length in enumerate(every.lengths) if length <= limit]
    assert [r["input_ids"] for r in found.table] == [every.table[i]["input_ids"] for i in kept]
    assert [found.row_name(k) for k in range(len(kept))] == [every.row_name(i) for i in kept]
    assert found.dropped == len(ROWS) - len(kept) > 0
    assert found.refused == 0
    assert [row["reason"] for row in asked.refused(found)] == ["too_long"] * found.dropped
    assert {(f.kind, f.level, f.count) for f in found.findings} == {("too_long", "left_out", found.dropped)}
    with pytest.raises(DataError, match="holds no usable row"):
        asked(max_length=8, on_too_long="drop")


def test_too_long_loses_the_left_of_its_prompt_and_nothing_of_its_answer(asked: Asked) -> None:
    every = asked()
    limit = int(np.median(every.lengths))
    found = asked(max_length=limit, on_too_long="truncate")
    for before, after in zip(every.table, found.table, strict=True):
        cut = max(0, len(before["input_ids"]) - limit)
        assert after["input_ids"] == before["input_ids"][cut:]
        assert after["labels"] == before["labels"][cut:]
        assert after["prompt_length"] == before["prompt_length"] - cut
        assert after["input_ids"][after["prompt_length"] :] == before["input_ids"][before["prompt_length"] :]
        assert sum(after["labels"]) == sum(before["labels"])
    assert (found.hashes == every.hashes).all(), "equal prompts must stay on one side of the split"
    assert found.truncated == sum(every.lengths > limit) > 0


def test_an_answer_is_never_cut(asked: Asked) -> None:
    write_rows(asked.path, [{"instruction": "q", "output": "a" * 90}, {"instruction": "q", "output": "a"}])
    answer = sum(asked().table[0]["labels"])
    assert asked(max_length=answer + 1, on_too_long="truncate").truncated == 1  # one token of the prompt is left
    found = asked(max_length=answer, on_too_long="truncate")
    (row,) = asked.refused(found)
    assert (row["where"], row["reason"]) == ("rows.jsonl:1", "too_long")
    assert f"has an answer of {answer} tokens" in row["message"]


def test_a_cut_keeps_the_begin_token_and_cuts_text_at_its_end(tokenizer: Any) -> None:
    begins = adds_bos(tokenizer, "<|endoftext|>")
    template = Template(begins, "alpaca_short")
    whole = template.encode(parse_example(Row({"instruction": "word " * 9, "output": "yes"}, "", 0), "alpaca", {}))
    limit = len(whole.ids) - 4
    (cut,) = fit_to_max_length(whole, limit, "truncate", "", False, template.bos_id)
    assert cut.ids == [template.bos_id, *whole.ids[5:]]
    assert cut.loss_mask == [False, *whole.loss_mask[5:]]
    assert (cut.prompt_length, len(cut.ids)) == (whole.prompt_length - 4, limit)
    text = template.encode(parse_example(Row({"text": "word " * 9}, "", 0), "text", {}))
    (cut,) = fit_to_max_length(text, 12, "truncate", "", True, template.bos_id)
    assert (cut.ids, cut.loss_mask, cut.prompt_length) == (text.ids[:12], text.loss_mask[:12], 0)


def test_a_cut_never_takes_every_label(tokenizer: Any) -> None:
    said = ("user", "q"), ("assistant", "first"), ("user", "long " * 20), ("assistant", "the second")
    chat = {"messages": [{"role": role, "content": text} for role, text in said]}
    whole = Template(tokenizer, "chat", train_on="assistant").encode(parse_example(Row(chat, "", 0), "chat", {}))
    short = len(whole.ids) - whole.prompt_length
    for length in range(8, short + 1):
        with pytest.raises(RowError, match="answer of") as caught:
            fit_to_max_length(whole, length, "truncate", "a:1", False, None)
        assert caught.value.code == "too_long"
    for length in range(short + 1, len(whole.ids)):
        (cut,) = fit_to_max_length(whole, length, "truncate", "a:1", False, None)
        assert any(cut.loss_mask[1:])
        assert cut.ids == whole.ids[-length:]
    early = Encoded(whole.ids, [False, True, *[False] * (len(whole.ids) - 2)], whole.prompt_length, 1)
    with pytest.raises(RowError, match="no token left in the loss"):
        fit_to_max_length(early, len(whole.ids) - 1, "truncate", "a:1", False, None)


def test_refused_rows_are_written_down_and_left_out(asked: Asked) -> None:
    bad = '{"instruction": "é\\ud800", "output": "\\ud800"}'
    with asked.path.open("a") as stream:
        stream.write(f'{{"instruction": "a"}}\n\n{bad}\nbroken {"x" * 3000}\n')
    for _ in range(2):
        found = asked()
        rows = asked.refused(found)
        assert [(row["where"], row["reason"]) for row in rows] == [
            ("rows.jsonl:24", "missing_field"),
            ("rows.jsonl:26", "lone_surrogate"),
            ("rows.jsonl:27", "broken_json"),
        ]
        assert [set(row) for row in rows] == [{"where", "reason", "message", "raw", "hint"}] * 3
        assert (rows[0]["raw"], rows[1]["raw"], len(rows[2]["raw"])) == ('{"instruction": "a"}', bad, 2000)
        assert (found.refused, len(found)) == (3, len(ROWS))
    assert len(asked.logged) == 2


@pytest.mark.parametrize("text", ["", "\n\n", "broken\n{]\n", '{"instruction": "a", "output": ""}\n' * 5])
def test_no_usable_row_names_the_first_and_where_all_are(asked: Asked, text: str) -> None:
    asked.path.write_text(text)
    for _ in range(2):
        with pytest.raises(DataError, match=r"rows\.jsonl: holds no usable row") as caught:
            asked()
    if text.strip():
        assert "rows.jsonl:1" in str(caught.value)
        (refused,) = asked.cache.glob("*/refused.jsonl")
        assert str(refused) in str(caught.value)
        assert len(refused.read_text().splitlines()) == len(text.splitlines())
    assert len(asked.logged) == 2


def test_the_format_is_that_of_the_first_row_that_has_one(asked: Asked) -> None:
    asked.path.write_text(
        'broken\n{"id": 3}\n{"prompt": "a", "completion": "b"}\n{"instruction": "a", "output": "b"}\n'
    )
    found = asked()
    assert (found.format, len(found), found.refused) == ("prompt_completion", 1, 3)
    asked.path.write_text('{"id": 3}\n' * 3)
    with pytest.raises(DataError, match=r"rows\.jsonl:1=fields id: fit no known format"):
        asked()
