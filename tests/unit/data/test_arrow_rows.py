"""The same rows as JSON Lines and as Arrow give the same tokens: what only a schema adds is taught to nobody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.helpers.tokenizers import QWEN_LIKE, with_template, write_rows
from trainer.config.dataset_spec import DatasetSpec
from trainer.data.formats.parse import parse_example
from trainer.data.sources.open import open_source
from trainer.data.sources.rows import Row, parse_rows
from trainer.data.templates.template import Template

REGISTER = {"type": "object", "properties": {"kind": {"type": "string"}, "no": {"type": "integer"}}, "required": ["no"]}
CLOCK = {"type": "object", "properties": {"zone": {"type": "string"}}}
TOOLS = [
    {"type": "function", "function": {"name": "register", "description": "look up", "parameters": REGISTER}},
    {"type": "function", "function": {"name": "clock", "parameters": CLOCK}},
]


def conversation(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    call = {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}
    messages = [
        {"role": "user", "content": "Which?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "10", "tool_call_id": "c1", "name": name},
        {"role": "assistant", "content": "Ten."},
    ]
    return {"tools": TOOLS, "messages": messages}


ROWS = [conversation("clock", {"zone": "UTC"}), conversation("register", {"kind": "lamp", "no": 1})]


def fields(path: Path) -> list[dict[str, Any]]:
    found = [row for chunk in open_source(DatasetSpec(str(path))).chunks() for row in parse_rows(chunk)]
    assert all(isinstance(row, Row) for row in found)
    return [row.fields for row in found if isinstance(row, Row)]


def test_every_arrow_form_of_rows_with_tools_is_what_json_lines_are(tmp_path: Path) -> None:
    lines = fields(write_rows(tmp_path / "rows.jsonl", ROWS))
    assert lines == ROWS
    table = pa.Table.from_pylist(ROWS)
    assert table.to_pylist() != ROWS, "the schema adds no key, so this shows nothing"
    pq.write_table(table, tmp_path / "struct.parquet")
    with pa.OSFile(str(tmp_path / "struct.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    mixed = datasets.Dataset.from_json(str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"))
    mixed.to_parquet(tmp_path / "json.parquet")  # `datasets` writes structs that differ as columns of JSON
    mixed.save_to_disk(tmp_path / "saved_json")
    for name in ("struct.parquet", "struct.arrow", "saved", "json.parquet", "saved_json"):
        assert json.dumps(fields(tmp_path / name)) == json.dumps(lines), name


def test_class_labels_come_by_their_names_wherever_datasets_notes_them(tmp_path: Path) -> None:
    label = datasets.ClassLabel(names=["old", "new"])
    features = datasets.Features({"instruction": datasets.Value("string"), "output": label, "all": [label]})
    rows = [{"instruction": "a", "output": 1, "all": [0, 1]}, {"instruction": "b", "output": None, "all": []}]
    kept = datasets.Dataset.from_list(rows, features=features)
    kept.save_to_disk(tmp_path / "saved")
    kept.to_parquet(tmp_path / "rows.parquet")
    expected = [{**rows[0], "output": "new", "all": ["old", "new"]}, rows[1]]
    assert fields(tmp_path / "saved") == fields(tmp_path / "rows.parquet") == expected


def test_a_null_that_is_no_key_of_a_struct_stays(tmp_path: Path) -> None:
    pairs = pa.array([[("a", 1), ("b", None)]], pa.map_(pa.string(), pa.int64()))
    table = pa.table({"list": [[1, None]], "null": pa.nulls(1), "map": pairs})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert fields(tmp_path / "rows.parquet") == [{"list": [1, None], "null": None, "map": {"a": 1, "b": None}}]
    noted = table.replace_schema_metadata({"huggingface": "{"})
    pq.write_table(noted, tmp_path / "rows.parquet")
    assert fields(tmp_path / "rows.parquet")[0]["list"] == [1, None]


KEYS = ["kind", "no", "zone", "of"]


def of_one_kind(depth: int) -> st.SearchStrategy[st.SearchStrategy[Any]]:
    """Draw a type; of it, values: a key of an object may be missing, what stands there is of one type in all rows."""
    plain = st.sampled_from([st.text(max_size=3), st.integers(-9, 9), st.booleans()])
    if not depth:
        return plain
    inner = of_one_kind(depth - 1)
    keys = st.dictionaries(st.sampled_from(KEYS), inner, min_size=1, max_size=3)
    return plain | inner.map(lambda item: st.lists(item, max_size=2)) | keys.map(_objects)


def _objects(kinds: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    ordered = {key: kinds[key] for key in sorted(kinds)}
    found = st.fixed_dictionaries({}, optional=ordered)
    return found.map(lambda value: {key: value[key] for key in ordered if key in value})


def _sorted_keys(kind: pa.DataType) -> pa.DataType:
    """Sort the drawn keys: Arrow keeps one order for all rows, the one in which it meets them."""
    if pa.types.is_struct(kind):
        inner = [(field.name, _sorted_keys(field.type)) for field in kind.fields]
        return pa.struct(sorted(inner, key=lambda pair: pair[0]) if {name for name, _ in inner} <= set(KEYS) else inner)
    return pa.list_(_sorted_keys(kind.value_type)) if pa.types.is_list(kind) else kind


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_nested_rows_give_the_same_tokens_as_parquet(tmp_path: Path, tokenizer: Any, data: st.DataObject) -> None:
    template = Template(with_template(tokenizer, QWEN_LIKE), "chat")
    arguments = data.draw(st.dictionaries(st.sampled_from(KEYS), of_one_kind(2), min_size=1, max_size=3).map(_objects))
    schema = data.draw(st.dictionaries(st.sampled_from(KEYS), of_one_kind(2), min_size=1, max_size=3).map(_objects))
    rows = []
    for _ in range(data.draw(st.integers(2, 4))):
        tools = [{"type": "function", "function": {"name": "f", "parameters": data.draw(schema)}}]
        rows.append({**conversation("f", data.draw(arguments)), "tools": tools})
    table = pa.Table.from_pylist(rows)
    ordered = pa.schema([(field.name, _sorted_keys(field.type)) for field in table.schema])
    try:
        pq.write_table(pa.Table.from_pylist(rows, schema=ordered), tmp_path / "rows.parquet")
    except pa.ArrowNotImplementedError:
        assume(False)  # Parquet has no struct without a key
    write_rows(tmp_path / "rows.jsonl", rows)
    encoded = [
        [template.encode(parse_example(Row(row, "", 0), "chat", {})) for row in fields(tmp_path / name)]
        for name in ("rows.jsonl", "rows.parquet")
    ]
    assert encoded[0] == encoded[1]
