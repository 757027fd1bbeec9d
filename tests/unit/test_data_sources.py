"""Files into rows into examples: whatever the bytes are, rows come out or one error that names file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.data.formats import Example, alpaca, recognise
from trainer.data.sources import Row, read_rows
from trainer.errors import DataError

GOOD = '{"instruction": "a", "output": "b"}'
files = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def write(folder: Path, content: bytes) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(content)
    return path


def examples(path: Path) -> list[Example]:
    rows = list(read_rows(path))
    return [alpaca(row) for row in rows if recognise(row, "auto") == "alpaca"]


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        (b"{", "is not JSON"),
        (b'{"a": 1,}', "is not JSON"),
        (b'{"a": 1} {"a": 2}', "is not JSON"),
        (b"[1, 2]", "is a JSON list, not an object"),
        (b'"text"', "is a JSON str, not an object"),
        (b"null", "is a JSON NoneType, not an object"),
        (b'{"a": "\xff"}', "is not UTF-8 (byte 7)"),
        (b'{"a": "\xed\xa0\x80"}', "is not UTF-8"),  # half a surrogate pair, as some encoders write it
        (b'\xef\xbb\xbf{"a": 1}', "is not JSON"),  # a byte-order mark belongs to the file's first line only
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "too many digits"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, rule: str) -> None:
    path = write(tmp_path, b"\n".join([GOOD.encode(), b"", line, GOOD.encode()]))
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert "rows.jsonl:3" in str(caught.value)
    assert rule in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"instruction": "a"}, "output: is missing"),
        ({"output": "a"}, "instruction: is missing"),
        ({"instruction": 3, "output": "a"}, "instruction=3: is int"),
        ({"instruction": "a", "output": None}, "output=None: is NoneType"),
        ({"instruction": "a", "output": ["b"]}, "is list"),
        ({"instruction": "a", "output": ""}, "output: is empty"),
        ({"instruction": " \n", "output": "b"}, "instruction: is empty"),
        ({"instruction": "a", "output": "b", "input": 0}, "input=0: is int"),
        ({"instruction": "a", "output": "b", "input": False}, "is bool"),
        ({"instruction": "a", "output": "b", "input": []}, "is list"),
        ({"instruction": "a", "output": "b", "input": {"c": 1}}, "is dict"),
        ({"instruction": "a", "output": "\ud83d"}, "half a surrogate pair at 0"),
    ],
)
def test_a_bad_field_is_named(tmp_path: Path, fields: dict[str, Any], rule: str) -> None:
    path = write(tmp_path, f"{GOOD}\n{json.dumps(fields)}\n".encode())
    with pytest.raises(DataError) as caught:
        [alpaca(row) for row in read_rows(path)]
    assert str(caught.value).startswith("rows.jsonl:2 ")
    assert rule in str(caught.value)


def test_unknown_fields_name_what_is_there_and_what_is_wanted() -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1=fields answer, question: .*`instruction`, `output`"):
        recognise(Row({"question": "a", "answer": "b"}, "rows.jsonl:1", 1), "auto")


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n \t\n", b"\r\n\r\n"])
def test_line_ends_blank_lines_and_byte_order_marks_do_not_matter(tmp_path: Path, end: bytes) -> None:
    rows = [{"instruction": f"q {i}\n\u2028\x85", "output": "é 😀"} for i in range(3)]
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    for mark in (b"", b"\xef\xbb\xbf"):
        for last in (b"", end):
            read = list(read_rows(write(tmp_path, mark + end.join(lines) + last)))
            assert [r.fields for r in read] == rows
    lines_before = end.count(b"\n")
    assert [(r.where, r.line) for r in read] == [
        (f"rows.jsonl:{1 + i * lines_before}", 1 + i * lines_before) for i in range(3)
    ]


def test_null_and_missing_input_are_none(tmp_path: Path) -> None:
    path = write(tmp_path, f'{GOOD}\n{{"instruction": "a", "output": "b", "input": null, "id": 7}}\n'.encode())
    assert [e.input for e in examples(path)] == ["", ""]


@pytest.mark.parametrize("name", ["nothing.jsonl", "."])
def test_what_is_not_a_file_is_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        list(read_rows(tmp_path / name))


@files
@given(st.binary(max_size=300) | st.lists(st.binary(max_size=40)).map(b"\n".join))
def test_any_bytes_give_rows_or_one_error(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path, content)
    try:
        found = list(read_rows(path))
    except DataError as error:
        line = int(str(error).split("rows.jsonl:")[1].split(":")[0].split("=")[0])
        assert 1 <= line <= content.count(b"\n") + 1
    else:
        assert all(isinstance(row.fields, dict) for row in found)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
some_fields = st.dictionaries(st.sampled_from(["instruction", "input", "output", "other"]), json_values)


@files
@given(st.lists(some_fields | json_values, min_size=1, max_size=4))
def test_any_json_gives_examples_or_one_error(tmp_path: Path, values: list[Any]) -> None:
    path = write(tmp_path, "\n".join(json.dumps(v) for v in values).encode())
    try:
        found = examples(path)
    except DataError as error:
        message = str(error)
        assert "rows.jsonl:" in message
    else:
        assert [(e.instruction, e.input, e.output) for e in found] == [
            (v["instruction"], v.get("input") or "", v["output"]) for v in values
        ]
