"""`afina data`: the numbers are those of a plain recount, the mask that is shown is the mask that is trained."""

from __future__ import annotations

import io
import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import trainer.config
from tests.helpers import generated_data as made_data
from tests.helpers.tokenizers import sentencepiece_like
from trainer.data.batching.global_batch import global_batch, total_steps
from trainer.data.prepare.finding import Finding
from trainer.data.run_data import Data
from trainer.html import visible
from trainer.view import choose, collect, terminal
from trainer.view.overview import Overview, histogram, sample_rejected
from trainer.view.pieces import TokenDecoder

CONTROL = frozenset({0, 1, 2})  # ids of the tiny tokenizer: <|endoftext|>, <|im_start|>, <|im_end|>


@pytest.fixture(scope="module")
def decoder(tokenizer: Any) -> TokenDecoder:
    return TokenDecoder(tokenizer)


def config(*overrides: str) -> Any:
    return trainer.config.load(["model=tiny", *overrides])


def chat(tokenizer: Any, *turns: tuple[str, str]) -> made_data.Row:
    """Ids and mask of a conversation, put together by hand: assistant turns are in the loss, their end tokens too."""
    ids: list[int] = []
    loss_mask: list[bool] = []
    for role, text in turns:
        head = [1, *tokenizer.encode(f"{role}\n", split_special_tokens=True)]
        body = [*tokenizer.encode(text, split_special_tokens=True), 2]
        ids += head + body
        loss_mask += [False] * len(head) + [role == "assistant"] * len(body)
    return ids, loss_mask


@pytest.fixture(scope="module")
def data(tokenizer: Any) -> Data:
    """60 rows, every third of two answers; two are held out."""
    rng = random.Random(0)
    rows = []
    for i in range(60):
        turns = [("user", f"Say {'very ' * rng.randrange(12)}{i}."), ("assistant", f"{i}!")] * (2 if i % 3 == 0 else 1)
        rows.append(chat(tokenizer, *turns))
    return made_data.data(made_data.prepared(rows), held_out=(5, 9))


def overview(data: Data, tokenizer: Any, *overrides: str, examples: int = 3) -> Overview:
    made = config(*overrides)
    found = collect.collect_overview(data, made, tokenizer, None)
    return replace(found, examples=collect.few_examples(data, made, TokenDecoder(tokenizer), examples))


def test_numbers_are_those_of_a_plain_recount(data: Data, tokenizer: Any) -> None:
    found = overview(data, tokenizer)
    rows = data.train.tokens(np.arange(len(data.train)))
    lengths = sorted(len(t.ids) for t in rows)
    assert (found.train_rows, found.held_out_rows, found.tokens) == (58, 2, sum(lengths))
    assert found.label_tokens == sum(int(t.loss_mask[1:].sum()) for t in rows)
    low, _, high, top = found.quantiles
    assert (low, top) == (lengths[0], lengths[-1])
    assert lengths[math.floor(0.95 * 57)] <= high <= lengths[math.ceil(0.95 * 57)]
    assert [tokens for _, tokens in found.longest] == lengths[::-1][:5]
    for name, tokens in found.longest:
        assert len(data.train.tables.table[int(name.split(":")[1]) - 1]["input_ids"]) == tokens


@pytest.mark.parametrize("overrides", [[], ["batch.epochs=2.5"], ["batch.max_steps=2"], ["batch.global_size=58"]])
def test_sharing_counts_each_prefix_once(data: Data, tokenizer: Any, overrides: list[str]) -> None:
    """With room for a whole step in one forward, a trie computes the distinct prefixes of its rows."""
    made = config("batch.micro_tokens=1000000", "batch.global_size=8", *overrides)
    sharing = collect.collect_overview(data, made, tokenizer, None).sharing
    assert sharing is not None
    steps = total_steps(58, made.batch.global_size, made.batch.epochs, made.batch.max_steps)
    assert (sharing.steps, sharing.sampled) == (steps, min(steps, 32))
    useful = trie = padded = 0
    for step in range(steps):
        rows = [tuple(t.ids) for t in data.train.tokens(global_batch(0, step, 58, made.batch.global_size))]
        useful += sum(map(len, rows))
        trie += len({row[:n] for row in rows for n in range(1, len(row) + 1)})
        padded += len(rows) * max(map(len, rows))
    assert (sharing.useful_tokens, sharing.trie_tokens, sharing.padded_tokens) == (useful, trie, padded)
    assert sharing.useful_a_step == pytest.approx(useful / steps)
    assert sharing.shared_share == pytest.approx(1 - trie / useful)
    assert sharing.padding_share == pytest.approx(1 - useful / padded)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60), st.integers(4, 40))
def test_a_histogram_holds_every_row_once(lengths: list[int], most: int) -> None:
    bars = histogram(np.asarray(lengths, dtype=np.int32), most)
    assert len(bars) <= most
    assert all(a.end == b.begin for a, b in itertools.pairwise(bars))
    counted = [sum(bar.begin <= n < (bar.end or math.inf) for n in lengths) for bar in bars]
    assert [bar.rows for bar in bars] == counted
    assert sum(counted) == len(lengths)


@pytest.fixture(scope="module")
def decoders(tokenizer: Any) -> list[tuple[Any, TokenDecoder]]:
    tokenizers = [tokenizer, *(sentencepiece_like(prepend) for prepend in ("first", "always", "never"))]
    return [(t, TokenDecoder(t)) for t in tokenizers]


TEXT = st.text(st.sampled_from("ab \n\t<|im_end|>éñß世界مرحبا😀👩\u200d👧\u200b\u202e\x1b"), min_size=1, max_size=24)


@settings(max_examples=60, deadline=None)
@given(TEXT, st.integers(0, 60), st.integers(1, 7))
def test_pieces_are_the_tokens_and_their_mask(
    decoders: list[tuple[Any, TokenDecoder]], text: str, begin: int, every: int
) -> None:
    """Wherever the row is cut and the mask jumps, in whatever tokenizer: no token lost, none shown as half a letter."""
    for tokenizer, decoder in decoders:
        control = tokenizer.convert_tokens_to_ids("<|im_end|>")
        ids = [control, *tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True), control]
        ids = ids[min(begin, len(ids) - 1) :]
        loss_mask = [i // every % 2 == 1 for i in range(len(ids))]
        pieces = decoder.pieces(ids, loss_mask)
        assert [i for piece in pieces for i in piece.ids] == ids
        assert [piece.in_loss for piece in pieces for _ in piece.ids] == loss_mask
        assert [piece.start for piece in pieces] == [0, *itertools.accumulate(len(p.ids) for p in pieces[:-1])]
        assert all(piece.text and visible(piece.text) == piece.text for piece in pieces)
        assert not any("\N{REPLACEMENT CHARACTER}" in piece.text or "\x1b" in piece.text for piece in pieces)
        assert [piece.control for piece in pieces if piece.ids == (control,)] == [True] * ids.count(control)


@settings(max_examples=40, deadline=None)
@given(TEXT)
def test_whole_texts_are_shown_as_they_are(decoders: list[tuple[Any, TokenDecoder]], text: str) -> None:
    for tokenizer, decoder in decoders:
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        shown = "".join(piece.text for piece in decoder.pieces(ids, [True] * len(ids)))
        assert shown.removeprefix(" ") == visible(text).removeprefix(" ")


def test_text_that_looks_like_a_control_token_is_text(tokenizer: Any, decoder: TokenDecoder) -> None:
    ids, loss_mask = chat(tokenizer, ("user", "<|im_end|>"))
    pieces = decoder.pieces(ids, loss_mask)
    assert [p.text for p in pieces if p.control] == ["<|im_start|>", "<|im_end|>"]
    assert "".join(p.text for p in pieces) == "<|im_start|>user\n<|im_end|><|im_end|>"


def test_ids_that_no_vocabulary_has_are_shown(decoder: TokenDecoder) -> None:
    assert [p.text for p in decoder.pieces([99999], [True])] == ["⟨99999⟩"]


def test_plain_lines_hold_the_mask(data: Data, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show(overview(data, tokenizer, examples=5))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "─" not in out
    for number in range(5):
        block = out.split("\nexample ")[number + 1]
        line = int(block.split(":")[1].split(" ")[0])
        row = data.train.tables.table[line - 1]
        runs = itertools.groupby(zip(row["input_ids"], row["labels"], strict=True), key=lambda pair: pair[1])
        wanted = [tokenizer.decode([i for i, _ in run]) for mask, run in runs if mask]
        found = [part.split("»")[0] for part in block.split("«")[1 : len(wanted) + 1]]
        assert [text.replace("⟦", "").replace("⟧", "") for text in found] == wanted


@pytest.mark.parametrize(("colours", "marks"), [("256", False), (None, True)])
def test_a_terminal_has_colours_or_marks(data: Data, tokenizer: Any, colours: Any, marks: bool) -> None:
    out = io.StringIO()
    finding = Finding("duplicate", "warning", 2, "2 rows are \x1b[31mdouble", ("made.jsonl:1",))
    found = replace(overview(data, tokenizer), findings=(finding,))
    console = Console(file=out, force_terminal=True, color_system=colours, width=60, highlight=False)
    terminal.show(found, console)
    text = out.getvalue()
    assert ("«" in text, "\x1b[38;5;16;48;5;114m" in text) == (marks, not marks)
    assert "⟨U+001B⟩" in text
    assert "█" in text


def test_long_rows_are_cut_in_a_terminal_only(tokenizer: Any) -> None:
    data = made_data.data(made_data.prepared([chat(tokenizer, ("user", "x y " * 900), ("assistant", "z"))]))
    made = config("batch.global_size=1")
    (example,) = collect.many_examples(data, made, TokenDecoder(tokenizer))
    assert sum(len(p.ids) for p in example.pieces) == example.tokens > 1800
    found = replace(collect.collect_overview(data, made, tokenizer, None), examples=(example,))
    text = "\n".join(terminal.plain(found))
    assert "tokens not shown, see --html" in text
    assert text.count("x y") < 300


def test_choices_name_their_reasons_and_come_once(data: Data) -> None:
    finding = Finding("leak", "warning", 2, "m", ("made.jsonl:6", "made.jsonl:8", "gone.jsonl:1"))
    found = replace(data, findings=(finding,))
    many = choose.choose_many(found, config("batch.global_size=8"), CONTROL, 200)
    assert len({(c.row, c.held_out) for c in many}) == len(many) == 60
    named = [c for c in many if "leak" in c.why]
    sides = {False: data.train, True: data.validation}
    assert sorted((sides[c.held_out].names([c.row])[0], c.held_out) for c in named) == [
        ("made.jsonl:6", True),
        ("made.jsonl:8", False),
    ]
    few = choose.choose_few(data, config("batch.global_size=8"), CONTROL, 3)
    assert few[0].row == global_batch(0, 0, 58, 8)[0]
    assert data.train.lengths[few[1].row] == data.train.lengths.max()
    assert any("several turns" in c.why for c in few)
    assert choose.choose_few(data, config(), CONTROL, 0) == []


def test_a_page_has_a_budget_of_tokens(data: Data, decoder: TokenDecoder) -> None:
    shown = list(collect._within(iter(collect.many_examples(data, config(), decoder)), 200))
    assert 1 < len(shown) < 58
    assert sum(example.tokens for example in shown) <= 200


def test_data_without_training_rows_is_shown(tokenizer: Any, data: Data) -> None:
    empty = made_data.data(made_data.prepared([chat(tokenizer, ("user", "a"), ("assistant", "b"))]), held_out=[0])
    found = overview(empty, tokenizer)
    assert found.sharing is None
    assert found.examples == ()
    assert "data: 0 rows to train on, 1 held out" in list(terminal.plain(found))


def test_refused_rows_are_read_by_reason(tmp_path: Path) -> None:
    file = tmp_path / "refused.jsonl"
    rows = [{"where": f"a:{i}", "reason": "null" if i % 2 else "wrong_type", "message": "m", "raw": "x" * 900 + "\x1b"}
            for i in range(20)]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "half a li")
    found = sample_rejected([file, tmp_path / "missing.jsonl"])
    assert [row.where for row in found] == ["a:0", "a:2", "a:4", "a:1", "a:3", "a:5"]
    assert all(len(row.raw) == 401 for row in found)
