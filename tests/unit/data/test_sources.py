"""Files into rows: every kind, written by its own library, comes back row by row with its place; no bytes raise."""

from __future__ import annotations

import csv
import gzip
import json
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.config.dataset_spec import DatasetSpec
from trainer.data.sources import readers
from trainer.data.sources.open import open_source
from trainer.data.sources.rows import Chunk, RejectedRow, Row, parse_rows
from trainer.errors import DataError

ROWS = [{"instruction": f'q {i}, "so"\nand é 😀', "output": f" a {i}\t" * (i + 1)} for i in range(7)]
GOOD = b'{"instruction": "a", "output": "b"}'
files = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def read(path: Path, **keys: Any) -> list[Row | RejectedRow]:
    return [row for chunk in open_source(DatasetSpec(str(path), **keys)).chunks() for row in parse_rows(chunk)]


def fields(path: Path, **keys: Any) -> list[dict[str, Any]]:
    found = read(path, **keys)
    assert all(isinstance(row, Row) for row in found), found
    return [row.fields for row in found if isinstance(row, Row)]


def put(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(rows: list[Any], ascii: bool = False) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=ascii).encode() + b"\n" for row in rows)


def zstd(content: bytes) -> bytes:
    return pa.Codec("zstd").compress(content, asbytes=True)


@pytest.mark.parametrize(
    ("line", "code", "reason"),
    [
        (b"{", "broken_json", "is not JSON"),
        (b'{"a": 1,}', "broken_json", "is not JSON"),
        (b'{"a": 1} {"a": 2}', "broken_json", "is not JSON"),
        (b"[1, 2]", "not_an_object", "is a JSON list, not an object"),
        (b'"text"', "not_an_object", "is a JSON str, not an object"),
        (b"null", "not_an_object", "is a JSON NoneType, not an object"),
        (b'{"a": "\xff"}', "not_utf8", "is not UTF-8 (byte 7)"),
        (b'{"a": "\xed\xa0\x80"}', "not_utf8", "is not UTF-8"),  # half a surrogate pair, as some encoders write it
        (b'\xef\xbb\xbf{"a": 1}', "broken_json", "is not JSON"),  # a byte-order mark belongs to the first line only
        (b"[" * 100_000, "broken_json", "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "broken_json", "too many digits"),
        (b'{"a": "\0"}', "broken_json", "control character"),
    ],
)
def test_a_bad_line_is_refused_in_its_place(tmp_path: Path, line: bytes, code: str, reason: str) -> None:
    first, bad, last = read(put(tmp_path, "rows.jsonl", b"\n".join([GOOD, b"", line, GOOD])))
    assert isinstance(first, Row)
    assert isinstance(last, Row)
    assert (first.where, last.where) == ("rows.jsonl:1", "rows.jsonl:4")
    assert isinstance(bad, RejectedRow)
    assert (bad.where, bad.reason) == ("rows.jsonl:3", code)
    assert reason in bad.message
    assert " → " in bad.message
    assert len(bad.message) < 250
    assert bad.raw == line.decode(errors="backslashreplace")[:2000]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n \t\n", b"\r\n\r\n"])
def test_line_ends_blank_lines_and_byte_order_marks_do_not_matter(tmp_path: Path, end: bytes) -> None:
    rows = [{"instruction": f"q {i}\n\u2028\x85\0", "output": "é 😀"} for i in range(3)]
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    for mark in (b"", b"\xef\xbb\xbf"):
        for last in (b"", end):
            for name in ("rows.jsonl", "rows.json"):
                found = read(put(tmp_path, name, mark + end.join(lines) + last))
                assert [r.fields for r in found if isinstance(r, Row)] == rows
    before = end.count(b"\n")
    assert [r.where for r in found] == [f"rows.json:{1 + i * before}" for i in range(3)]


def test_tables_by_pandas(tmp_path: Path) -> None:
    table = pandas.DataFrame(ROWS)
    table.to_csv(tmp_path / "a.csv", index=False, encoding="utf-8-sig")
    table.to_csv(tmp_path / "a.tsv", index=False, sep="\t", quoting=csv.QUOTE_ALL)
    table.to_csv(tmp_path / "a.csv.gz", index=False)
    table.to_json(tmp_path / "a.jsonl", orient="records", lines=True, force_ascii=False)
    table.to_json(tmp_path / "lines.json", orient="records", lines=True)
    table.to_json(tmp_path / "a.json", orient="records")
    table.to_json(tmp_path / "pretty.json", orient="records", indent=2)
    table.to_parquet(tmp_path / "a.parquet", row_group_size=2)
    table.to_feather(tmp_path / "a.arrow")
    for path in tmp_path.iterdir():
        assert fields(path) == ROWS, path.name
    assert [row.where for row in read(tmp_path / "a.csv")] == [f"a.csv:{2 + 2 * i}" for i in range(7)]
    assert [row.where for row in read(tmp_path / "a.json")] == [f"a.json:{1 + i}" for i in range(7)]
    assert [row.where for row in read(tmp_path / "a.parquet")] == [f"a.parquet:{1 + i}" for i in range(7)]
    lines = (tmp_path / "pretty.json").read_text().splitlines()
    for row in read(tmp_path / "pretty.json"):
        assert isinstance(row, Row)
        assert lines[row.line - 1].strip() == "{"
        assert json.dumps(row.fields["instruction"]) in lines[row.line].replace("\\/", "/")


def test_compressed_files(tmp_path: Path) -> None:
    content = jsonl(ROWS)
    put(tmp_path, "a.jsonl.gz", gzip.compress(content[:50]) + gzip.compress(content[50:]))
    put(tmp_path, "b.JSONL.GZ", gzip.compress(b"\xef\xbb\xbf" + content))
    put(tmp_path, "c.ndjson.zst", zstd(content))
    put(tmp_path, "d.json.zst", zstd(json.dumps({"version": 1, "data": ROWS}, indent=1).encode()))
    for path in tmp_path.iterdir():
        assert fields(path) == ROWS, path.name


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
@pytest.mark.parametrize(
    "harm", [lambda b: b[:-5], lambda b: b[:40], lambda b: b"", lambda b: b"plain text", lambda b: b"x" + b]
)
def test_a_damaged_compressed_file_is_one_error(tmp_path: Path, pack: Any, harm: Any) -> None:
    content = "".join(f'{{"a": {random.random()}}}\n' for _ in range(2000)).encode()
    suffix = ".gz" if pack is gzip.compress else ".zst"
    with pytest.raises(DataError, match=rf"^bad\.jsonl\{suffix}: cannot be read \(.*→") as caught:
        read(put(tmp_path, f"bad.jsonl{suffix}", harm(pack(content))))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.jsonl.gz"])
def test_utf_16_is_called_by_its_name(tmp_path: Path, encoding: str, name: str) -> None:
    content = (GOOD.decode() + "\n").encode(encoding)
    if name.endswith(".gz"):
        content = gzip.compress(content)
    with pytest.raises(DataError, match=r"is UTF-16, and text is read as UTF-8 → iconv"):
        read(put(tmp_path, name, content))


def test_csv_rows_that_do_not_fit(tmp_path: Path) -> None:
    content = (
        b'\xef\xbb\xbfa,b\r\n1,"two\r\nlines"\r\n\r\n3\r\n4,5,6\r\n7,\xff\r\n8,"x"y\r\n9,""\r\n10,"open\r\n11,12\r\n'
    )
    found = read(put(tmp_path, "a.csv", content))
    assert [r.where for r in found] == [f"a.csv:{n}" for n in (2, 5, 6, 7, 8, 9, 10)]
    assert [r.fields if isinstance(r, Row) else r.reason for r in found] == [
        {"a": "1", "b": "two\r\nlines"},
        *("missing_field", "wrong_type", "not_utf8", "wrong_type"),
        {"a": "9", "b": ""},
        "wrong_type",
    ]
    texts = [r.raw for r in found if isinstance(r, RejectedRow)]
    assert texts == ["3", "4,5,6", "7,\\xff", '8,"x"y', '10,"open\r\n11,12']
    assert "line 7, byte 2" in found[3].message if isinstance(found[3], RejectedRow) else False


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a,b,a\n1,2,3\n", "names a column twice (a)"),
        ("a;b\n1;2\n", "separated by ';'"),
        ("a\tb\n1\t2\n", "separated by '\\t'"),
        ("\xff".encode("latin-1"), "no header that can be read"),
    ],
)
def test_a_header_that_cannot_be_used(tmp_path: Path, content: bytes | str, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        read(put(tmp_path, "a.csv", content))
    assert reason in str(caught.value)
    assert str(caught.value).startswith("a.csv:1:")


def test_text_files(tmp_path: Path) -> None:
    path = put(tmp_path, "a.txt", b"\xef\xbb\xbf one\r\n\n\t\ntwo \x00\xc2\x85 end\n\xff\nlast")
    found = read(path)
    assert [(r.where, r.fields if isinstance(r, Row) else r.reason) for r in found] == [
        ("a.txt:1", {"text": " one"}),
        ("a.txt:4", {"text": "two \0\x85 end"}),
        ("a.txt:5", "not_utf8"),
        ("a.txt:6", {"text": "last"}),
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", []),
        (" \n", []),
        ("[]", []),
        ('[{"a": 1}]', [(1, {"a": 1})]),
        ('\n [{"a": 1}, 2,\n {"a": 3}]\n', [(1, {"a": 1}), (2, "not_an_object"), (3, {"a": 3})]),
        ('[{"a": 1},\n 2, {"a": 3}]', [(1, {"a": 1}), (2, "not_an_object"), (2, {"a": 3})]),
        ('{"instruction": "a",\n "output": "b"}', [(1, {"instruction": "a", "output": "b"})]),
        ('{"messages": [{"role": "user"}]}', [(1, {"messages": [{"role": "user"}]})]),
        ('{"n": {}, "data": [\n{"a": 1},\n{"a": 2}]}', [(2, {"a": 1}), (3, {"a": 2})]),
        ('{"a": 1}\n\n{"a": 2}', [(1, {"a": 1}), (3, {"a": 2})]),
        ('{"a": 1,}\n{"a": 2}', [(1, "broken_json"), (2, {"a": 2})]),
        (b'{"a": "\xff"}\n{"a": 2}', [(1, "not_utf8"), (2, {"a": 2})]),
        (b'[{"a": "\xff"},\n{"a": 2}]', [(1, "not_utf8"), (2, {"a": 2})]),
        ("null", [(1, "not_an_object")]),
    ],
)
def test_json_files(tmp_path: Path, content: bytes | str, expected: list[Any]) -> None:
    found = read(put(tmp_path, "a.json", content))
    lines = [int(row.where.split(":")[1]) for row in found]
    assert list(zip(lines, [r.fields if isinstance(r, Row) else r.reason for r in found], strict=True)) == expected


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('[{"a": 1},\n{"a": 2]', "a.json:2: is not JSON (Expecting ',' delimiter)"),
        ('[{"a": 1},\n{"a": 2}', "a.json:2: is not JSON (Expecting ',')"),
        ('[{"a": 1}] x', "a.json:1: is not JSON (more text after"),
        ('{"a": 1\n', "a.json:2: is not JSON"),
        ('{"train": [{"a": 1}], "test": [{"a": 1}]}', "a.json: holds several arrays: train, test"),
        ("[" * 100_000, "a.json:1: is not JSON (nested too deeply)"),
        ('[\n{"a": ' + "9" * 5000 + "}]", "a.json:2: is not JSON (a number has too many digits)"),
    ],
)
def test_broken_json_files_name_the_line(tmp_path: Path, content: str, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        read(put(tmp_path, "a.json", content))
    assert str(caught.value).startswith(reason)
    assert "→" in str(caught.value)


def pieces() -> st.SearchStrategy[bytes]:
    odd = [
        b'{"a": 1}',
        b"{",
        b"}",
        b'{"a": "',
        b"\xff",
        b"\xef\xbb\xbf",
        b"\r",
        b"\n",
        b" ",
        b",",
        b"[",
        b"]",
        b"\0",
        b'"',
    ]
    return st.binary(max_size=200) | st.lists(st.sampled_from(odd) | st.binary(max_size=20), max_size=20).map(b"".join)


@files
@given(pieces())
def test_any_bytes_end_as_rows_refused_or_blank(tmp_path: Path, content: bytes) -> None:
    lines = content.split(b"\n")
    try:
        found = read(put(tmp_path, "rows.jsonl", content))
    except DataError as error:
        message = str(error)
        assert "is UTF-16" in message or "is one JSON array" in message
        return
    places = [int(row.where.removeprefix("rows.jsonl:")) for row in found]
    blank = [n for n, line in enumerate(lines, 1) if not line.decode(errors="replace").lstrip("\ufeff").strip()]
    assert sorted(set(places) | set(blank)) == list(range(1, len(lines) + 1))
    assert len(places) == len(set(places))
    for row, place in zip(found, places, strict=True):
        if isinstance(row, Row):
            assert row.fields == json.loads(lines[place - 1].decode("utf-8-sig").strip())
        json.dumps(row.raw if isinstance(row, RejectedRow) else 0, ensure_ascii=False).encode()


@files
@given(
    pieces(), st.sampled_from(["a.json", "a.csv", "a.tsv", "a.txt", "a.parquet", "a.arrow", "a.jsonl.gz", "a.json.zst"])
)
def test_no_bytes_raise_anything_else(tmp_path: Path, content: bytes, name: str) -> None:
    try:
        found = read(put(tmp_path, name, content))
    except DataError as error:
        message = str(error)
        assert "\n" not in message
        return
    for row in found:
        assert row.where.startswith(f"{name}:")


@files
@given(st.lists(st.dictionaries(st.text(max_size=3), st.text() | st.integers() | st.none(), max_size=3), max_size=9))
def test_any_rows_come_back_and_chunks_do_not_matter(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = put(tmp_path, "rows.jsonl", jsonl(rows, ascii=True))
    expected = read(path)
    assert [row.fields for row in expected if isinstance(row, Row)] == rows
    with pytest.MonkeyPatch.context() as patch:
        for lines, size in ((1, 1 << 20), (2, 1 << 20), (1000, 1), (1000, 30)):
            patch.setattr(readers, "CHUNK_LINES", lines)
            patch.setattr(readers, "CHUNK_BYTES", size)
            chunks = list(open_source(DatasetSpec(str(path))).chunks())
            assert all(0 < len(chunk.lines) <= lines for chunk in chunks)
            again: Iterator[Chunk] = iter(pickle.loads(pickle.dumps(chunks)))
            assert [row for chunk in again for row in parse_rows(chunk)] == expected
