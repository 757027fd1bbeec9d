"""The data of a run: training rows and held-out rows, with what was found in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.prepared_data import ROWS, Asked
from tests.helpers.tokenizers import write_rows
from trainer.config import load
from trainer.data.load import inspect_data, load_data
from trainer.errors import DataError


@pytest.fixture
def loaded_from(asked: Asked) -> Any:
    def loads(*overrides: str) -> Any:
        common = ["model=tiny", f"data.path={asked.path}", "data.validation=5", "batch.global_size=4"]
        config = load([*common, f"data.cache_dir={asked.cache}", *overrides])
        return load_data(config, asked.tokenizer)

    return loads


def test_data_of_a_run(loaded_from: Any, asked: Asked) -> None:
    data = loaded_from()
    assert (len(data.train), len(data.validation)) == (18, 5)
    assert data.end_ids == (asked.tokenizer.eos_token_id,)
    prompts = [set(rows.tables.hashes[0][rows.indices].tolist()) for rows in (data.train, data.validation)]
    assert not prompts[0] & prompts[1]
    which = np.asarray([3, 0, 7])
    examples = data.train.examples(which)
    assert [len(e["input_ids"]) for e in examples] == list(data.train.lengths[which])
    assert data.train.label_tokens(which) == sum(sum(e["labels"]) for e in examples)
    assert data.train.names(which) == [f"rows.jsonl:{e['line']}" for e in examples]
    tokens = data.train.tokens(which)
    assert [t.ids.tolist() for t in tokens] == [e["input_ids"] for e in examples]
    assert [t.loss_mask.tolist() for t in tokens] == [e["labels"] for e in examples]
    assert data.train.tokens([]) == []
    assert data.train.examples([]) == []
    assert [p.names for p in data.parts] == [("rows.jsonl",)]
    assert [f.kind for f in data.findings] == ["few_rows"]


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
    assert [p.names for p in data.parts] == [("rows.jsonl",), ("held.jsonl",)]
    with pytest.raises(DataError, match=r"batch\.global_size=24: is more than the 23 training rows"):
        loaded_from(f"data.validation={held}", "batch.global_size=24")


def test_a_held_out_row_that_is_trained_on_is_an_error(loaded_from: Any, tmp_path: Path) -> None:
    held = write_rows(tmp_path / "held.jsonl", [{"instruction": "x", "output": "y"}, {**ROWS[4], "output": "other"}])
    findings = {f.kind: f for f in loaded_from(f"data.validation={held}").findings}
    assert (findings["leak"].count, findings["leak"].where) == (1, ("held.jsonl:2",))


def test_refused_rows_are_an_error_beyond_what_is_allowed(loaded_from: Any, asked: Asked) -> None:
    write_rows(asked.path, [*ROWS, {"instruction": "a"}, {"instruction": "a", "output": ""}])
    refused = r"data\.max_refused=(0|1|0\.04): 2 of 25 rows cannot be used: rows\.jsonl:24 output.*\(missing_field\); "
    for allowed in ("0", "1", "0.04"):
        with pytest.raises(DataError, match=refused + r"rows\.jsonl:25.*\(empty_answer\).*/refused\.jsonl"):
            loaded_from(f"data.max_refused={allowed}")
    for allowed in ("2", "0.08"):
        data = loaded_from(f"data.max_refused={allowed}")
        assert (len(data.train), data.parts[0].refused) == (18, 2)
    assert [text.split()[0] for text in asked.logged] == ["preparing", "prepared"], "max_refused prepares nothing again"
    too_long = r"data\.max_refused=2.*\(too_long\).*data\.on_too_long=drop"
    with pytest.raises(DataError, match=too_long):
        loaded_from("data.max_refused=2", "data.max_length=20")


def test_looking_at_data_never_fails_for_its_rows(asked: Asked) -> None:
    write_rows(asked.path, [*ROWS[:3], {"instruction": "a"}])
    common = ["model=tiny", f"data.path={asked.path}", f"data.cache_dir={asked.cache}", "batch.global_size=999"]
    for validation, left in (("1", 2), ("3", 3), ("0.9", 3)):
        config = load([*common, f"data.validation={validation}"])
        data = inspect_data(config, asked.tokenizer)
        assert (len(data.train), data.parts[0].refused) == (left, 1)
        with pytest.raises(DataError):
            load_data(config, asked.tokenizer)
