"""What is said of data that are not used, or not right: one line each, with the reason whole and a cure that fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas
import pytest

from tests.helpers.metrics import CHAT
from tests.helpers.tokenizers import with_template, write_rows
from trainer.config import load
from trainer.data.describe import describe
from trainer.data.load import inspect_data, load_data
from trainer.data.prepare.finding import Finding
from trainer.data.prepare.unused import check_unused
from trainer.data.run_data import Data
from trainer.errors import AfinaError, ConfigError, DataError

ALPACA = {"instruction": "q", "output": "a"}


@pytest.fixture
def loaded(tmp_path: Path, tokenizer: Any) -> Any:
    def loads(path: Path | str, *overrides: str, template: str | None = None, must_train: bool = False) -> Data:
        typed = [f"data.path={path}", "data.validation=0", "batch.global_size=1", f"data.cache_dir={tmp_path}/cache"]
        used = tokenizer if template is None else with_template(tokenizer, template)
        return (load_data if must_train else inspect_data)(load([*typed, *overrides]), used)

    return loads


def finding(data: Data, kind: str) -> Finding:
    (found,) = (f for f in data.findings if f.kind == kind)
    return found


def test_one_line_for_every_column_that_nobody_reads(tmp_path: Path, loaded: Any) -> None:
    rows = [{"messages": CHAT, "loss_": i or None, "pages": [1] if i < 3 else []} for i in range(120)]
    told = finding(loaded(write_rows(tmp_path / "rows.jsonl", rows)), "not_used")
    assert (told.level, told.message, told.count) == ("note", "not used: loss_ (119 rows), pages (3)", 119)
    rows = [{**ALPACA, "Input": "i"}] * 3 + [{**ALPACA, "id": 1}] * 2
    config = load([f"data.path={write_rows(tmp_path / 'rows.jsonl', rows)}", "batch.global_size=1"])
    data = loaded(config.data.path)
    told = finding(data, "not_used")
    assert told.level == "warning"
    assert told.message == "not used: Input (3 rows), id (2) → did you mean input? 'data.columns={input:Input}'"
    assert f"warning: {told.message}" in describe(data, config), "a run's log says so too"


def test_a_column_that_groups_rows_is_used(tmp_path: Path, loaded: Any) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{**ALPACA, "document": i, "id": i + 1} for i in range(3)])
    assert finding(loaded(path, "data.group_by=document"), "not_used").message == "not used: id (3 rows)"


@pytest.mark.parametrize(
    ("column", "format", "hint"),
    [
        ("inputs", "alpaca", "did you mean input? 'data.columns={input:inputs}'"),
        ("context", "alpaca", "did you mean input? 'data.columns={input:context}'"),
        ("System", "chat", "did you mean system? 'data.columns={system:System}'"),
        ("system_prompt", "prompt_completion", "did you mean system? 'data.columns={system:system_prompt}'"),
        ("context", "prompt_completion", "data.columns={instruction:prompt,output:completion,input:context}"),
        ("label", "text", "to predict label from it: 'data.columns={instruction:text,output:label}'"),
        ("loss", "chat", '{"role": "assistant", "content": "…", "loss": …}'),
        ("rejected_response", "chat", "rejected_response looks like preference data"),
        ("id", "chat", ""),
        ("url", "text", ""),
    ],
)
def test_what_a_column_was_meant_to_be(column: str, format: str, hint: str) -> None:
    (told,) = check_unused({column: 2}, format, {})
    assert told.message.startswith(f"not used: {column} (2 rows)")
    assert told.level == ("warning" if hint else "note")
    assert hint in told.message
    assert (" → " in told.message) == bool(hint)


def test_many_columns_are_one_line() -> None:
    (told,) = check_unused({f"c{i}": i + 1 for i in range(50)}, "chat", {})
    assert told.message.endswith("and 30 more")
    assert check_unused({}, "chat", {}) == []


def test_rows_that_are_kept_by_a_column(tmp_path: Path, loaded: Any) -> None:
    rows = [{"prompt": f"q {i}", "completion": "a", "label": bool(i % 2)} for i in range(6)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"keep:label\}' trains on the good ones alone"):
        loaded(path)
    data = loaded(path, "data.columns={keep: label}", must_train=True)
    assert data.train.names(range(3)) == ["rows.jsonl:2", "rows.jsonl:4", "rows.jsonl:6"]
    told = finding(data, "not_kept")
    assert (told.level, told.count) == ("left_out", 3)
    assert (data.parts[0].refused, data.parts[0].dropped) == (0, 0)


REFUSES_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system → put it into the user turn') }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
)


def test_a_reason_is_never_cut_and_the_cure_is_that_of_the_row(tmp_path: Path, loaded: Any) -> None:
    system = {"messages": [{"role": "system", "content": "s"}, *CHAT]}
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": CHAT}, system, system, {"messages": [CHAT[0]]}])
    whole = "refuses the turns system → user → assistant (no system → put it into the user turn)"
    cure = "data.template=FILE.jinja, one that takes them"
    told = finding(loaded(path, template=REFUSES_SYSTEM), "template")
    assert told.message.endswith(f"in 2 rows → {cure}; or data.max_refused=3 trains without the refused rows")
    assert finding(loaded(path, template=REFUSES_SYSTEM), "empty_loss_mask").message.endswith(
        "in 1 row → remove the row; or data.max_refused=3 trains without the refused rows"
    )
    with pytest.raises(DataError) as caught:
        loaded(path, template=REFUSES_SYSTEM, must_train=True)
    assert str(caught.value).count(whole) == 1, "what is the same of several rows is said once"
    assert caught.value.hint == f"{cure}; remove the row; or data.max_refused=3 to train without them"
    with pytest.raises(DataError) as caught:
        loaded(write_rows(tmp_path / "rows.jsonl", [system] * 4), template=REFUSES_SYSTEM)
    assert str(caught.value).count(whole) == 1
    assert str(caught.value).endswith(f" → {cure}")


def test_counts_by_file_and_format(tmp_path: Path, loaded: Any) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    write_rows(folder / "a.jsonl", [ALPACA] * 5 + [{**ALPACA, "output": ""}])
    write_rows(folder / "b.jsonl", [{"messages": CHAT}] * 3 + [{**ALPACA, "output": ""}] * 2)
    write_rows(folder / "c.jsonl", [{"text": "t"}, {"messages": CHAT}])
    data = loaded(folder)
    chat = finding(data, "format_chat")
    assert chat.count == 4
    assert (
        "the row is of the format chat, and the data set of another, in 4 rows (b.jsonl: 3, c.jsonl: 1) → "
        in chat.message
    )
    mixed = "'data.path=[{path:FILES,format:alpaca},{path:OTHERS,format:chat}]'"
    assert f"data.format=chat if all rows are, else {mixed}" in chat.message
    assert "in 3 rows (b.jsonl: 2, a.jsonl: 1) → remove the row" in finding(data, "empty_answer").message
    assert finding(data, "format_text").where == ("c.jsonl:1",)
    assert "a row of the format chat" in data.parts[0].refused_file.read_text()
    alone = loaded(write_rows(tmp_path / "one.jsonl", [ALPACA, {"text": "t"}]))
    assert "in 1 row → " in finding(alone, "format_text").message


def told_of(loaded: Any, path: Path | str) -> str:
    with pytest.raises(AfinaError) as caught:
        loaded(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_are_named_or_written_otherwise(tmp_path: Path, loaded: Any) -> None:
    rows = [{"instruction": f"q {i}", "output": "a"} for i in range(3)]
    for text in (json.dumps(rows), json.dumps(rows, indent=1), "\n [\n" + json.dumps(rows)[1:]):
        (tmp_path / "rows.jsonl").write_text(text)
        assert told_of(loaded, tmp_path / "rows.jsonl").endswith("→ name it .json: rows.json")
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps([rows[0]])}\n{json.dumps(rows[0])}\n")
    assert loaded(tmp_path / "rows.jsonl").parts[0].refused == 1, "a row that is a list is told of as a row"
    table = pandas.DataFrame(rows)
    for orient in ("columns", "index", "split"):
        table.to_json(tmp_path / "rows.json", orient=orient)
        told = told_of(loaded, tmp_path / "rows.json")
        assert f"orient='{orient}'" in told
        assert told.endswith("df.to_json('FILE.jsonl', orient='records', lines=True)")
    for orient in ("records", "table"):
        table.to_json(tmp_path / "rows.json", orient=orient)
        assert len(loaded(tmp_path / "rows.json").train) == 3


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("https://huggingface.co/datasets/owner/name/resolve/main/a.jsonl?download=true", "data.path=owner/name"),
        ("hf://datasets/owner/name", "data.path=owner/name"),
        ("https://example.org/a.jsonl", "then data.path=FILE"),
        ("s3://bucket/a.jsonl", "then data.path=FILE"),
    ],
)
def test_an_address_is_no_file(path: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.path=.*is an address") as caught:
        load([f"data.path='{path}'"])
    assert str(caught.value).endswith(hint)
