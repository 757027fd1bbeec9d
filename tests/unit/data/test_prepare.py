"""Prepared tables: built once, found again by what matters, complete or not there."""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.helpers.logged import logged_to
from tests.helpers.prepared_data import ROWS, Asked
from tests.helpers.tokenizers import with_template, write_rows
from trainer.config.schema import DataConfig
from trainer.data.formats.parse import parse_example
from trainer.data.prepare.encode import SCHEMA
from trainer.data.prepare.table import ROWS_FILE
from trainer.data.sources.rows import Row
from trainer.data.templates.template import Template


def finished_tables(cache: Path) -> set[Path]:
    return {f for f in cache.glob("*/COMPLETE") if not f.parent.name.endswith(".partial")}


def test_the_table_holds_what_the_template_makes(asked: Asked) -> None:
    found, template = asked(), Template(asked.tokenizer, "chat")
    assert len(found) == len(ROWS)
    for i, (row, record) in enumerate(zip(ROWS, found.table, strict=True)):
        encoded = template.encode(parse_example(Row(row, "", 0), "alpaca", {}))
        assert record["input_ids"] == encoded.ids
        assert record["labels"] == encoded.loss_mask
        assert (record["prompt_length"], record["answer"]) == (encoded.prompt_length, row["output"])
        assert (found.lengths[i], found.label_counts[i]) == (len(encoded.ids), sum(encoded.loss_mask))
        assert (record["file"], record["line"], found.row_name(i)) == (0, i + 1, f"rows.jsonl:{i + 1}")
    assert (found.refused, found.dropped, found.truncated) == (0, 0, 0)
    assert (found.format, found.names, asked.refused(found)) == ("alpaca", ("rows.jsonl",), [])
    assert found.lengths.dtype == found.label_counts.dtype == np.int32
    assert found.table.features.arrow_schema.equals(SCHEMA)


def test_hashes_are_of_the_prompt_prefix_and_of_the_whole_row(asked: Asked) -> None:
    write_rows(asked.path, [{"instruction": i, "output": o} for i, o in ("ax", "ax", "ay", "bx")])
    prefix, whole, _ = asked().hashes
    assert prefix[0] == prefix[1] == prefix[2] != prefix[3]
    assert whole[0] == whole[1]
    assert len(set(whole.tolist())) == 3


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_processes_writes_the_same_bytes(asked: Asked, workers: int) -> None:
    rows = [
        {"instruction": f"Say {i % 700}", "output": "" if i % 311 == 0 else str(i % 1400 // 700)} for i in range(3500)
    ]
    write_rows(asked.path, rows)
    children = psutil.Process().children()
    found = asked(workers=1)
    files = {f.name: f.read_bytes() for f in found.folder.iterdir()}
    assert set(files) == {"rows.arrow", "counts.npy", "keys.npy", "refused.jsonl", "COMPLETE"}
    assert (found.refused, len(found)) == (12, 3488)
    assert {"duplicate", "other_answer", "empty_answer"} <= {f.kind for f in found.findings}
    shutil.rmtree(found.folder)
    again = asked(workers=workers)
    assert again.folder == found.folder
    assert {f.name: f.read_bytes() for f in again.folder.iterdir()} == files
    assert asked.logged[2] == f"preparing rows.jsonl in {workers} processes"
    assert psutil.Process().children() == children


def test_a_label_on_the_first_token_is_not_counted(asked: Asked) -> None:
    found = asked(train_on="all")
    assert list(found.label_counts) == list(found.lengths - 1)


def test_a_second_call_builds_nothing(asked: Asked) -> None:
    first = asked()
    files = {f: f.stat().st_mtime_ns for f in asked.cache.rglob("*") if f.is_file() and f.suffix != ".lock"}
    again = asked()
    assert [text.split()[0] for text in asked.logged] == ["preparing", "prepared"]
    assert first.fingerprint == again.fingerprint
    assert first.table[:] == again.table[:]
    assert {f: f.stat().st_mtime_ns for f in files} == files


@pytest.mark.parametrize(
    "keys",
    [
        {"template": "alpaca"},
        {"template": "alpaca_short"},
        {"max_length": 500},
        {"on_too_long": "drop"},
        {"train_on": "all"},
        {"alpaca_role": "system"},
        {"control_tokens": "parse"},
    ],
)
def test_the_fingerprint_changes_with_what_matters(asked: Asked, keys: dict[str, Any]) -> None:
    assert asked().fingerprint != asked(**keys).fingerprint


@pytest.mark.parametrize(
    "keys",
    [
        {"validation": 3},
        {"max_rows": 5},
        {"cache_dir": "elsewhere"},
        {"path": "other"},
        {"max_refused": 3},
        {"group_by": None},
        {"workers": 2},
    ],
)
def test_the_fingerprint_stays_with_what_does_not(asked: Asked, keys: dict[str, Any]) -> None:
    assert asked().fingerprint == asked(**keys).fingerprint
    assert len(asked.logged) == 2


def test_the_fingerprint_changes_with_bytes_and_tokenizer_and_not_with_use(asked: Asked) -> None:
    seen = {asked().fingerprint}
    asked.tokenizer("a text", split_special_tokens=True)  # using a tokenizer is not changing it
    assert {asked().fingerprint} == seen
    (asked.path.parent / "elsewhere").mkdir()
    asked.path = asked.path.rename(asked.path.parent / "elsewhere" / asked.path.name)
    assert {asked().fingerprint} == seen
    asked.path.write_text(asked.path.read_text().replace("Say 1 ", "Say 1. ", 1))
    seen.add(asked().fingerprint)
    seen.add(asked(with_template(asked.tokenizer, asked.tokenizer.chat_template + " ")).fingerprint)
    for change in ({"eos_token": "<|endoftext|>"}, {"bos_token": "<|endoftext|>"}):
        other = copy.deepcopy(asked.tokenizer)
        for name, token in change.items():
            setattr(other, name, token)
        seen.add(asked(other).fingerprint)
    grown = copy.deepcopy(asked.tokenizer)
    grown.add_tokens(["word word"])
    seen.add(asked(grown).fingerprint)
    assert len(seen) == 6


@pytest.mark.parametrize("where", ["encode", "save", "rename"])
def test_a_kill_in_the_middle_leaves_no_half_table(asked: Asked, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    expected = asked(max_length=999).table[:]  # another fingerprint, the same rows
    complete = finished_tables(asked.cache)
    (asked.cache / "stale.partial").mkdir()
    calls = iter(range(1000))
    encode = Template.encode

    def killed(*args: Any, **keys: Any) -> Any:
        if where == "encode" and next(calls) < 11:
            return encode(*args, **keys)
        return os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        owner, name = {"encode": (Template, "encode"), "save": (np, "save"), "rename": (Path, "rename")}[where]
        patch.setattr(owner, name, killed)
        child = multiprocessing.get_context("fork").Process(target=asked)
        child.start()
        child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert len(list(asked.cache.glob("*.partial"))) == 1, "the stale one is gone, that of the killed process is left"
    assert finished_tables(asked.cache) == complete
    assert asked().table[:] == expected
    assert not list(asked.cache.glob("*.partial"))


def test_a_table_that_was_changed_behind_our_back_is_prepared_again(asked: Asked) -> None:
    table = asked()
    expected = table.table[:]
    file = table.folder / ROWS_FILE
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.unlink()  # the table is mapped into this process
    file.write_bytes(content)
    assert asked().table[:] == expected
    assert any("rows.arrow is not what was written" in line for line in asked.logged), asked.logged
    assert sum("prepared again" in line for line in asked.logged) == 1


def test_processes_at_once_build_once(asked: Asked, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, lines = context.Barrier(4), tmp_path / "lines"

    def append(text: str) -> None:
        with lines.open("a") as stream:
            stream.write(text + "\n")

    def child() -> None:
        start.wait()
        with logged_to(append):
            assert len(asked()) == len(ROWS)

    children = [context.Process(target=child) for _ in range(4)]
    for process in children:
        process.start()
    for process in children:
        process.join(60)
    assert [process.exitcode for process in children] == [0, 0, 0, 0]
    assert lines.read_text().count("preparing rows.jsonl") == 1


def test_config_keys_are_all_sorted_into_those_that_matter_and_those_that_do_not() -> None:
    """A new data key must be thought about: does it change the tokens?"""
    matter = {
        "path",
        "format",
        "columns",
        "text_unit",
        "control_tokens",
        "split",
        "subset",
        "revision",
        "template",
        "alpaca_role",
        "template_kwargs",
        "max_length",
        "on_too_long",
    }
    other = {"validation", "group_by", "max_rows", "max_refused", "workers", "cache_dir"}
    assert {f.name for f in dataclasses.fields(DataConfig)} == matter | {"train_on"} | other
