"""Prepared tables: built once, found again by what matters, complete or not there."""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.small import with_template, write_rows
from trainer.config import load
from trainer.config.schema import DataConfig
from trainer.data.formats import Example
from trainer.data.load import load_data
from trainer.data.prepare import Prepared, label_count, prepare
from trainer.data.templates import Template
from trainer.errors import DataError

ROWS = [{"instruction": f"Say {i} " + "word " * (i % 5), "output": f"{i}" * (1 + i % 3)} for i in range(23)]


def finished_tables(cache: Path) -> set[Path]:
    return {f for f in cache.glob("*/COMPLETE") if not f.parent.name.endswith(".partial")}


class Asked:
    """``prepare`` on rows of its own, counting how often a table is built."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.path = write_rows(folder / "rows.jsonl", ROWS)
        self.cache, self.tokenizer, self.said = folder / "cache", tokenizer, list[str]()

    def __call__(self, tokenizer: Any = None, **keys: Any) -> Prepared:
        data = DataConfig(**{"path": str(self.path), **keys})
        return prepare(self.path, data, tokenizer or self.tokenizer, self.cache, self.said.append)


@pytest.fixture
def asked(tmp_path: Path, tokenizer: Any) -> Asked:
    return Asked(tmp_path, tokenizer)


def test_the_table_holds_what_the_template_makes(asked: Asked) -> None:
    found, template = asked(), Template(asked.tokenizer, "chat")
    assert len(found) == len(ROWS)
    for i, (row, record) in enumerate(zip(ROWS, found.table, strict=True)):
        encoded = template.encode(Example(row["instruction"], "", row["output"], "", 0))
        assert record["input_ids"] == encoded.ids
        assert record["labels"] == encoded.labels
        assert (record["prompt_length"], record["answer"]) == (encoded.prompt_length, row["output"])
        assert (found.lengths[i], found.label_counts[i]) == (len(encoded.ids), sum(encoded.labels))
        assert found.name_of(i) == f"rows.jsonl:{i + 1}"
    assert (found.dropped, found.truncated) == (0, 0)
    assert found.lengths.dtype == found.label_counts.dtype == np.int32


def test_a_label_on_the_first_token_is_not_counted(asked: Asked) -> None:
    found = asked(train_on="all")
    assert list(found.label_counts) == list(found.lengths - 1)
    assert label_count([True, False, True]) == 1
    assert label_count([False, True, True]) == 2


def test_a_second_call_builds_nothing(asked: Asked) -> None:
    first = asked()
    files = {f: f.stat().st_mtime_ns for f in asked.cache.rglob("*") if f.is_file() and f.suffix != ".lock"}
    again = asked()
    assert asked.said == ["preparing rows.jsonl"]
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
    ],
)
def test_the_fingerprint_changes_with_what_matters(asked: Asked, keys: dict[str, Any]) -> None:
    assert asked().fingerprint != asked(**keys).fingerprint


@pytest.mark.parametrize("keys", [{"validation": 3}, {"max_rows": 5}, {"cache_dir": "elsewhere"}, {"path": "other"}])
def test_the_fingerprint_stays_with_what_does_not(asked: Asked, keys: dict[str, Any]) -> None:
    assert asked().fingerprint == asked(**keys).fingerprint
    assert len(asked.said) == 1


def test_the_fingerprint_changes_with_bytes_and_tokenizer_and_not_with_name_or_use(asked: Asked) -> None:
    seen = {asked().fingerprint}
    asked.tokenizer("a text", split_special_tokens=True)  # using a tokenizer is not changing it
    assert {asked().fingerprint} == seen
    moved = asked.path.rename(asked.path.with_name("moved.jsonl"))
    asked.path = moved
    assert {asked().fingerprint} == seen
    moved.write_text(moved.read_text().replace("Say 1 ", "Say 1. ", 1))
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


def test_too_long_stops_and_names_the_line(asked: Asked) -> None:
    longest = int(max(asked().lengths))
    assert len(asked(max_length=longest)) == len(ROWS)
    with pytest.raises(DataError, match=rf"rows\.jsonl:\d+: is {longest} tokens long, .*={longest - 1}"):
        asked(max_length=longest - 1)


def test_too_long_is_left_out(asked: Asked) -> None:
    every = asked()
    limit = int(np.median(every.lengths))
    found = asked(max_length=limit, on_too_long="drop")
    kept = [i for i, length in enumerate(every.lengths) if length <= limit]
    assert [r["input_ids"] for r in found.table] == [every.table[i]["input_ids"] for i in kept]
    assert [found.name_of(k) for k in range(len(kept))] == [every.name_of(i) for i in kept]
    assert found.dropped == len(ROWS) - len(kept) > 0
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
        assert after["prompt_key"] == before["prompt_key"], "equal prompts must stay on one side of the split"
    assert found.truncated == sum(every.lengths > limit) > 0


def test_an_answer_is_never_cut(asked: Asked) -> None:
    write_rows(asked.path, [{"instruction": "q", "output": "a" * 30}])
    answer = sum(asked().table[0]["labels"])
    asked(max_length=answer + 1, on_too_long="truncate")  # one token of the prompt is left to predict from
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: has an answer of {answer} tokens"):
        asked(max_length=answer, on_too_long="truncate")


def test_a_bad_row_leaves_no_table(asked: Asked) -> None:
    write_rows(asked.path, [*ROWS, {"instruction": "a"}])
    for _ in range(2):
        with pytest.raises(DataError, match=r"rows\.jsonl:24 output"):
            asked()
        assert not [f for f in asked.cache.iterdir() if f.is_dir()]


@pytest.mark.parametrize("where", ["encode", "save", "rename"])
def test_a_kill_in_the_middle_leaves_no_half_table(asked: Asked, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    expected = asked(max_length=999).table[:]  # another fingerprint, the same rows
    complete = finished_tables(asked.cache)
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
    assert len(list(asked.cache.glob("*.partial"))) == 1
    assert finished_tables(asked.cache) == complete
    assert asked().table[:] == expected
    assert not list(asked.cache.glob("*.partial"))


def test_processes_at_once_build_once(asked: Asked, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, said = context.Barrier(4), tmp_path / "said"

    def child() -> None:
        def say(text: str) -> None:
            with said.open("a") as stream:
                stream.write(text + "\n")

        start.wait()
        data = DataConfig(path=str(asked.path))
        assert len(prepare(asked.path, data, asked.tokenizer, asked.cache, say)) == len(ROWS)

    children = [context.Process(target=child) for _ in range(4)]
    for process in children:
        process.start()
    for process in children:
        process.join(60)
    assert [process.exitcode for process in children] == [0, 0, 0, 0]
    assert said.read_text() == "preparing rows.jsonl\n"


def test_a_file_that_is_not_there_is_told(asked: Asked) -> None:
    asked.path.unlink()
    with pytest.raises(DataError, match=r"data\.path=.*rows\.jsonl: cannot be read"):
        asked()


@pytest.fixture
def loaded_from(asked: Asked) -> Any:
    def loads(*overrides: str) -> Any:
        common = ["model=tiny", f"data.path={asked.path}", "data.validation=5", "batch.global_size=4"]
        config = load([*common, f"data.cache_dir={asked.cache}", *overrides])
        return load_data(config, asked.tokenizer, asked.said.append)

    return loads


def test_data_of_a_run(loaded_from: Any, asked: Asked) -> None:
    data = loaded_from()
    assert (len(data.train), len(data.validation)) == (18, 5)
    assert data.end_ids == (asked.tokenizer.eos_token_id,)
    prompts = [{r["prompt_key"] for r in rows.examples(range(len(rows)))} for rows in (data.train, data.validation)]
    assert not prompts[0] & prompts[1]
    which = np.asarray([3, 0, 7])
    examples = data.train.examples(which)
    assert [len(e["input_ids"]) for e in examples] == list(data.train.lengths[which])
    assert data.train.label_tokens(which) == sum(sum(e["labels"]) for e in examples)
    assert data.train.names(which) == [f"rows.jsonl:{e['line']}" for e in examples]
    tokens = data.train.tokens(which)
    assert [t.ids.tolist() for t in tokens] == [e["input_ids"] for e in examples]
    assert [t.labels.tolist() for t in tokens] == [e["labels"] for e in examples]
    assert data.train.tokens([]) == []
    assert data.train.examples([]) == []


def test_the_data_fingerprint_knows_rows_and_split(loaded_from: Any, asked: Asked) -> None:
    same = {loaded_from(*o).fingerprint for o in ((), ("batch.global_size=2",), ("optim.eps=1e-6",))}
    other = {loaded_from(o).fingerprint for o in ("run.seed=1", "data.validation=4", "data.max_rows=9")}
    assert len(same) == 1
    assert len(other | same) == 4


def test_validation_may_be_a_file_of_its_own(loaded_from: Any, asked: Asked, tmp_path: Path) -> None:
    held = write_rows(tmp_path / "held.jsonl", [{"instruction": "x", "output": "y"}] * 3)
    data = loaded_from(f"data.validation={held}")
    assert (len(data.train), len(data.validation)) == (len(ROWS), 3)
    assert data.validation.names([2]) == ["held.jsonl:3"]
    with pytest.raises(DataError, match=r"batch\.global_size=24: is more than the 23 training rows"):
        loaded_from(f"data.validation={held}", "batch.global_size=24")


def test_config_keys_are_all_sorted_into_those_that_matter_and_those_that_do_not() -> None:
    """A new data key must be thought about: does it change the tokens?"""
    matter = {"path", "format", "template", "alpaca_role", "max_length", "on_too_long", "train_on"}
    assert {f.name for f in dataclasses.fields(DataConfig)} == matter | {"validation", "max_rows", "cache_dir"}
