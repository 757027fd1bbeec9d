"""Rows that some template has written already: said where it is not meant, and read as they are meant where asked."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.prepared_data import Asked
from tests.helpers.tokenizers import adds_bos, llama3_like, sentencepiece_like, write_rows
from trainer.config import load
from trainer.data.load import inspect_data
from trainer.models.embedded.tiny import CHATML

BEGIN, END = "<|im_start|>", "<|im_end|>"
NUMBERS = range(6)


def messages(number: int) -> list[dict[str, str]]:
    """Two rounds."""
    said = (f"Say {number}", f"{number}.", "Again", f"{number}!")
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


def rendered(turns: list[dict[str, str]]) -> str:
    return "".join(f"{BEGIN}{turn['role']}\n{turn['content']}{END}\n" for turn in turns)


CHAT = [{"messages": messages(i)} for i in NUMBERS]
TEXT = [{"text": rendered(messages(i))} for i in NUMBERS]
SINGLE = [{"prompt": f"Say {i}", "completion": f"{i}."} for i in NUMBERS]
PROMPT = [{"prompt": rendered(messages(i)[:1]) + f"{BEGIN}assistant\n", "completion": f"{i}.{END}"} for i in NUMBERS]


@pytest.fixture
def tokens(asked: Asked) -> Any:
    """Prepare rows of our own; returns ids and masks of each, and the findings by their kind."""

    def loads(rows: list[dict[str, Any]], *overrides: str, tokenizer: Any = None) -> Any:
        write_rows(asked.path, rows)
        keys = ["model=tiny", f"data.path={asked.path}", f"data.cache_dir={asked.cache}", "data.validation=0"]
        data = inspect_data(load([*keys, *overrides]), tokenizer or asked.tokenizer)
        found = [(t.ids.tolist(), t.loss_mask.tolist()) for t in data.train.tokens(range(len(data.train)))]
        return found, {f.kind: f for f in data.findings}, data

    return loads


PARSE = "data.control_tokens=parse"


@pytest.mark.parametrize("rows", [TEXT, PROMPT, [{**row, "completion": f"{row['completion']}{END}"} for row in SINGLE]])
def test_most_rows_hold_control_tokens(tokens: Any, rows: list[dict[str, Any]]) -> None:
    _, findings, _ = tokens(rows)
    found = findings["control_tokens"]
    assert (found.level, found.count) == ("warning", len(rows))
    assert END in found.message
    assert "data.control_tokens=parse" in found.message
    assert "control_tokens" not in tokens(rows, PARSE)[1]


def test_markers_of_another_model(tokens: Any) -> None:
    _, findings, _ = tokens(TEXT, PARSE, "data.template=plain", tokenizer=llama3_like())
    found = findings["control_tokens"]
    assert (found.level, found.count) == ("warning", len(TEXT))
    assert "this tokenizer has no such tokens" in found.message


def test_a_single_row_that_holds_one_is_text(tokens: Any, asked: Asked) -> None:
    rows = [*SINGLE, {"prompt": f"What is {END}?", "completion": "A control token."}]
    found, findings, _ = tokens(rows)
    assert (findings["control_tokens"].level, findings["control_tokens"].count) == ("note", 1)
    end = asked.tokenizer.eos_token_id
    assert found[-1][0].count(end) == found[0][0].count(end)
    assert "control_tokens" not in tokens(SINGLE)[1]


@pytest.mark.parametrize("train_on", ["completion", "assistant", "last_assistant"])
def test_a_rendered_text_is_what_its_conversation_is(tokens: Any, train_on: str) -> None:
    found, _, data = tokens(TEXT, PARSE, f"data.train_on={train_on}")
    assert found == tokens(CHAT, f"data.train_on={train_on}")[0]
    assert data.parts[0].format == "text"
    assert "no_end_token" not in {f.kind for f in data.findings}


def test_all_of_it_where_all_is_asked_for(tokens: Any) -> None:
    found, _, _ = tokens(TEXT, PARSE, "data.train_on=all")
    ids, mask = found[0]
    assert all(mask)
    assert ids[: len(ids) - 1] == tokens(CHAT, "data.train_on=all")[0][0][0][: len(ids) - 1]


def test_a_rendered_prompt_is_what_its_turn_is(tokens: Any) -> None:
    found, _, data = tokens(PROMPT, PARSE)
    expected, _, plain = tokens(SINGLE)
    assert found == expected
    assert data.train.prompt_lengths.tolist() == plain.train.prompt_lengths.tolist()
    assert data.train.texts("answer") == plain.train.texts("answer") == [f"{i}." for i in NUMBERS]
    unended = [{**row, "completion": row["completion"].removesuffix(END)} for row in PROMPT]
    assert tokens(unended, PARSE)[0] == expected


@pytest.mark.parametrize("tail", [END, f"{END}\n", f" {END}{END}"])
def test_an_end_token_behind_an_answer_is_not_written_twice(tokens: Any, tail: str) -> None:
    single = [{**row, "completion": row["completion"] + tail} for row in SINGLE]
    assert tokens(single, PARSE)[0] == tokens(SINGLE)[0]
    chats = [
        {"messages": [{**m, "content": m["content"] + tail * (m["role"] == "assistant")} for m in row["messages"]]}
        for row in CHAT
    ]
    found, _, data = tokens(chats, PARSE)
    assert found == tokens(CHAT)[0]
    assert data.train.texts("answer") == [f"{i}!" for i in NUMBERS]


def test_control_tokens_in_other_rows_are_genuine(tokens: Any, asked: Asked) -> None:
    rows = [{"prompt": f"<|endoftext|>{i}", "completion": "a <|endoftext|> b"} for i in NUMBERS]
    special = asked.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert [
        ids.count(special)
        for ids, _ in tokens(
            [{"prompt": f"{i} <|endoftext|>", "completion": "a <|endoftext|> b"} for i in NUMBERS], PARSE
        )[0]
    ] == [2] * 6
    assert [ids.count(special) for ids, _ in tokens(rows)[0]] == [0] * 6


def test_texts_without_turns_are_learned_whole(tokens: Any, asked: Asked) -> None:
    special = asked.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    found, _, _ = tokens([{"text": f"one {i}<|endoftext|>two {i}"} for i in NUMBERS], PARSE)
    for ids, mask in found:
        assert ids.count(special) == 1
        assert all(mask)
        assert ids[-1] == asked.tokenizer.eos_token_id


def test_a_base_without_a_chat_template_reads_chatml(tokens: Any, asked: Asked) -> None:
    base = copy.deepcopy(asked.tokenizer)
    base.chat_template, base.eos_token = None, "<|endoftext|>"
    found, _, data = tokens(TEXT, PARSE, "data.template=plain", tokenizer=base)
    assert found == tokens(CHAT)[0]
    assert data.end_ids == (2, 0)
    assert tokens(PROMPT, PARSE, "data.template=plain", tokenizer=base)[0] == tokens(SINGLE)[0]


@pytest.mark.parametrize("rows", [TEXT, PROMPT])
def test_a_tokenizer_that_wants_a_begin_token_gets_one(tokens: Any, asked: Asked, rows: list[dict[str, Any]]) -> None:
    begins = adds_bos(asked.tokenizer, "<|endoftext|>")
    plain = tokens(rows, PARSE)[0]
    found, findings, _ = tokens(rows, PARSE, tokenizer=begins)
    assert found == [([begins.bos_token_id, *ids], [False, *mask]) for ids, mask in plain]
    assert "<|endoftext|>" in findings["begin_token"].message
    first = next(iter(rows[0]))
    written = [{**row, first: f"<|endoftext|>{row[first]}"} for row in rows]
    assert tokens(written, PARSE, tokenizer=begins)[0] == found


def test_a_template_from_a_file_gets_it_too(tokens: Any, asked: Asked, tmp_path: Path) -> None:
    """And the saved tokenizer's template writes it, so that the model is asked as it was trained."""
    from trainer.data.templates.template import Template

    used = sentencepiece_like("never", CHATML)
    file = tmp_path / "chatml.jinja"
    file.write_text(CHATML)
    begins = adds_bos(used, "<s>")
    keys = (f"data.template={file}", "data.train_on=completion")
    plain = tokens(CHAT, *keys, tokenizer=used)[0]
    found, findings, _ = tokens(CHAT, *keys, tokenizer=begins)
    assert [(ids, mask) for ids, mask in found] == [([begins.bos_token_id, *i], [False, *m]) for i, m in plain]
    assert (findings["begin_token"].level, "it is put there" in findings["begin_token"].message) == ("note", True)
    template = Template(begins, str(file))
    assert template.encode_prompt("a")[0] == begins.bos_token_id
    begins.chat_template = template.chat_template
    saved = begins.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True)
    assert saved == f"<s>{BEGIN}user\na{END}\n{BEGIN}assistant\n"
    assert tokens(CHAT, tokenizer=begins)[0] == found, "it is the tokenizer's own now, and writes one"
    begins.chat_template = CHATML
    untouched, findings, _ = tokens(CHAT, tokenizer=begins)
    assert untouched == plain, "its own template is taken as it is served"
    assert "there is none" in findings["begin_token"].message


@pytest.mark.parametrize("rows", [TEXT, PROMPT])
def test_another_answer_to_a_prompt_is_told(tokens: Any, rows: list[dict[str, Any]]) -> None:
    """The first answer counts: what comes later answers what may have gone another way."""
    last = "completion" if rows is PROMPT else "text"
    others = [{**rows[0], last: rows[0][last].replace("0.", "Nothing.")}]
    assert tokens([*rows, *others], PARSE)[1]["other_answer"].count == 1
    later = [{**rows[0], last: rows[0][last].replace("0!", "Nothing!")}]
    assert "other_answer" not in tokens([*rows, *later], PARSE)[1]


def test_variables_of_the_template_do_not_hide_what_opens_an_answer(tokens: Any, asked: Asked) -> None:
    thinks = copy.deepcopy(asked.tokenizer)
    quiet = "{% if quiet and add_generation_prompt %}<think>\n\n</think>\n\n{% endif %}"
    thinks.chat_template = f"{thinks.chat_template}{quiet}"
    keys = (PARSE, "data.template_kwargs={quiet: true}")
    assert tokens(TEXT, *keys, tokenizer=thinks)[0] == tokens(TEXT, PARSE)[0]
