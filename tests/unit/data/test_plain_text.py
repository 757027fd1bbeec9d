"""Plain text: what a row of it is, and what becomes of a row that is too long: pieces that lose nothing."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.prepared_data import Asked
from tests.helpers.tokenizers import adds_bos, write_rows
from trainer.config import load
from trainer.config.dataset_spec import DatasetSpec
from trainer.data.load import inspect_data
from trainer.data.prepare.length import fit_to_max_length
from trainer.data.sources import plain_text
from trainer.data.sources.open import open_source
from trainer.data.sources.rows import Row, parse_rows
from trainer.data.templates.encoded import Encoded
from trainer.errors import DataError

BOOK = "\ufeffA title\r\n\r\nIt begins\r\nwith two lines.\n\n \n\tAn indent stays.\nThe end\n\n"


def units(path: Path, unit: str) -> list[tuple[int, str]]:
    source = open_source(DatasetSpec(str(path), text_unit=unit))
    rows = [row for chunk in source.chunks() for row in parse_rows(chunk)]
    assert all(isinstance(row, Row) for row in rows)
    return [(row.line, row.fields["text"]) for row in rows if isinstance(row, Row)]


@pytest.mark.parametrize("suffix", ["txt", "text", "txt.gz"])
def test_a_line_a_paragraph_or_the_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"book.{suffix}"
    path.write_bytes(gzip.compress(BOOK.encode()) if suffix.endswith("gz") else BOOK.encode())
    lines = [(1, "A title"), (3, "It begins"), (4, "with two lines."), (7, "\tAn indent stays."), (8, "The end")]
    assert units(path, "line") == lines
    assert units(path, "paragraph") == [
        (1, "A title"),
        (3, "It begins\r\nwith two lines."),
        (7, "\tAn indent stays.\nThe end"),
    ]
    assert units(path, "file") == [(1, BOOK.removeprefix("\ufeff").rstrip())]


def test_blank_files_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b" \n\n")
    (tmp_path / "b.txt").write_bytes(b"good\n\nbad \xff\nmore")
    for unit, places in (("file", ["b.txt:1"]), ("paragraph", ["b.txt:3"]), ("line", ["b.txt:3"])):
        source = open_source(DatasetSpec(str(tmp_path), text_unit=unit))
        rows = [row for chunk in source.chunks() for row in parse_rows(chunk)]
        assert [row.where for row in rows if not isinstance(row, Row)] == places


@pytest.mark.parametrize("unit", ["paragraph", "file"])
def test_a_row_has_a_largest_size(tmp_path: Path, unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_text, "MAX_LINE_BYTES", 100)
    (tmp_path / "a.txt").write_text("word " * 10 + "\n" + "word " * 11)
    with pytest.raises(DataError, match=r"a\.txt.* longer than .* data\.text_unit="):
        units(tmp_path / "a.txt", unit)


def test_the_digest_knows_the_unit_where_it_matters(tmp_path: Path) -> None:
    for name, kinds in (("a.txt", 3), ("a.jsonl", 1)):
        (tmp_path / name).write_text('{"text": "a"}\n')
        found = {
            open_source(DatasetSpec(str(tmp_path / name), text_unit=u)).digest() for u in ("line", "paragraph", "file")
        }
        assert len(found) == kinds


@pytest.fixture
def inspected(asked: Asked) -> Any:
    def loads(*overrides: str, tokenizer: Any = None) -> Any:
        keys = [
            "model=tiny",
            "data=text",
            f"data.path={asked.path}",
            f"data.cache_dir={asked.cache}",
            "data.validation=0",
        ]
        return inspect_data(load([*keys, *overrides]), tokenizer or asked.tokenizer)

    return loads


def test_lines_are_said_to_be_rows(inspected: Any, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(BOOK)
    found = {
        unit: [
            f.level
            for f in inspected(f"data.path={tmp_path / 'book.txt'}", f"data.text_unit={unit}").findings
            if f.kind == "text_unit"
        ]
        for unit in ("line", "paragraph", "file")
    }
    assert found == {"line": ["note"], "paragraph": [], "file": []}


@pytest.mark.parametrize("begins", [False, True])
def test_a_long_text_in_pieces(inspected: Any, asked: Asked, begins: bool) -> None:
    tokenizer = adds_bos(asked.tokenizer, "<|im_start|>") if begins else asked.tokenizer
    texts = ["word " * 40, "the user asks a question " * 30, "short"]
    write_rows(asked.path, [{"text": text} for text in texts])
    whole = inspected("data.max_length=4000", tokenizer=tokenizer).train
    data = inspected("data.max_length=16", "data.on_too_long=split", tokenizer=tokenizer)
    assert max(data.train.lengths) == 16
    every = range(len(whole)), range(len(data.train))
    labels = [
        [int(i) for t in rows.tokens(which) for i, label in zip(t.ids[1:], t.loss_mask[1:], strict=True) if label]
        for rows, which in zip((whole, data.train), every, strict=True)
    ]
    assert labels[0] == labels[1]
    for tokens, before in zip(data.train.tokens(every[1])[1:], data.train.tokens(every[1]), strict=False):
        if begins:
            assert tokens.ids[0] == tokenizer.bos_token_id
        if not tokens.loss_mask[int(begins)]:  # it goes on: its first label is predicted from the token before it
            assert tokens.ids[int(begins)] == before.ids[-1]
    (finding,) = (f for f in data.findings if f.kind == "split")
    assert (finding.level, finding.count, finding.where) == ("note", 2, ("rows.jsonl:1", "rows.jsonl:2"))
    assert not [f for f in data.findings if f.kind in ("no_end_token", "truncated", "leak")]


def test_the_pieces_of_a_text_stay_on_one_side(inspected: Any, asked: Asked) -> None:
    write_rows(asked.path, [{"text": f"{n} " + "word " * 60} for n in range(8)])
    data = inspected("data.max_length=16", "data.on_too_long=split", "data.validation=0.5")
    sides = [{row["line"] for row in side.examples(range(len(side)))} for side in (data.train, data.validation)]
    assert sides[0] | sides[1] == set(range(1, 9))
    assert not sides[0] & sides[1]
    assert sides[1]


@pytest.mark.parametrize(("words", "level"), [(200, "warning"), (5, "note")])
def test_much_that_is_cut_away_is_a_warning(inspected: Any, asked: Asked, words: int, level: str) -> None:
    write_rows(asked.path, [{"text": "word " * words}, *({"text": "word " * 8 + str(i)} for i in range(20))])
    limit = max(inspected("data.max_length=4000").train.lengths[1:])
    data = inspected(f"data.max_length={max(8, limit if words > 5 else limit - 1)}", "data.on_too_long=truncate")
    (finding,) = (f for f in data.findings if f.kind == "truncated")
    assert finding.level == level
    lost = sum(inspected("data.max_length=4000").train.lengths) - sum(data.train.lengths)
    assert f"{lost:,} tokens (" in finding.message
    assert "data.on_too_long=split" in finding.message


masks = st.lists(st.tuples(st.booleans(), st.integers(1, 30)), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(masks, st.integers(8, 40), st.booleans(), st.booleans(), st.data())
def test_each_label_stands_in_exactly_one_piece(
    runs: list[tuple[bool, int]], limit: int, is_text: bool, begins: bool, data: st.DataObject
) -> None:
    mask = [is_text or label for label, count in runs for _ in range(count)]
    ids = list(range(len(mask)))  # each token is another, so a piece says which it holds
    labels = [i for i in ids[1:] if mask[i]]
    if not labels:
        return
    answer = 0 if is_text else data.draw(st.sampled_from(labels))
    whole = Encoded(ids, mask, answer, len(ids))
    pieces = fit_to_max_length(whole, limit, "split", "a:1", is_text, 0 if begins else None)
    if len(ids) <= limit:
        assert pieces == [whole]
        return
    found = []
    for piece in pieces:
        assert len(piece.ids) == len(piece.loss_mask) <= limit
        held = piece.ids[1:] if begins else piece.ids
        assert not begins or piece.ids[0] == 0
        assert held == list(range(held[0], held[-1] + 1)), "a piece is one stretch of the row"
        found += [i for i, label in zip(piece.ids[1:], piece.loss_mask[1:], strict=True) if label]
        assert any(piece.loss_mask[1:])
    assert found == labels
    scored = [piece for piece in pieces if piece.prompt_length]
    assert len(scored) == (not is_text)
    for piece in scored:
        assert piece.ids[piece.prompt_length] == answer


def test_an_answer_is_not_cut_that_fits() -> None:
    mask = [False] * 15 + [True] * 4 + [False] * 3 + [True] * 4
    whole = Encoded(list(range(26)), mask, 22, 15)
    pieces = fit_to_max_length(whole, 16, "split", "a:1", False, None)
    answers = [[i for i, label in zip(p.ids, p.loss_mask, strict=True) if label] for p in pieces]
    assert answers == [[15, 16, 17, 18], [22, 23, 24, 25]]
