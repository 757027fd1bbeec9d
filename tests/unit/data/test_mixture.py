"""Mixtures: how often each part's training rows are used, and several tables concatenated."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.tokenizers import write_rows
from trainer.config import load
from trainer.config.dataset_spec import DatasetSpec
from trainer.data.load import load_data
from trainer.data.mixture import limit_rows, mix_rows, repeat_rows
from trainer.data.run_data import Data
from trainer.errors import DataError

quick = settings(max_examples=100, deadline=None)
ROWS = np.asarray([2, 3, 5, 8, 13, 21])


@quick
@given(
    st.lists(st.integers(0, 10**6), min_size=1, max_size=60, unique=True).map(sorted),
    st.floats(0.01, 5) | st.integers(1, 200),
    st.integers(0, 9),
)
def test_each_row_as_often_as_its_share(rows: list[int], use: float, seed: int) -> None:
    part = DatasetSpec("a", rows=use) if isinstance(use, int) else DatasetSpec("a", weight=use)
    given_rows = np.asarray(rows)
    found = repeat_rows(given_rows, part, 0, seed)
    wanted = use if isinstance(use, int) else max(1, round(use * len(rows)))
    counts = Counter(found.tolist())
    assert len(found) == wanted
    assert found.dtype == np.int64
    assert list(found) == sorted(found)
    assert set(counts) <= set(rows)
    often = [counts[row] for row in rows]
    assert min(often) == wanted // len(rows)  # none is used again before all are used once
    assert max(often) - min(often) <= 1
    assert np.array_equal(found, repeat_rows(given_rows, part, 0, seed))


def test_the_draw_is_of_the_seed_and_the_part_and_no_rows_are_told() -> None:
    draws = {tuple(repeat_rows(np.arange(40), DatasetSpec("a", weight=0.5), n, s)) for n in range(3) for s in range(3)}
    assert len(draws) == 9, "the seed and the part's number both decide"
    with pytest.raises(DataError, match=r"data\.path\[1\]\.rows=3: b has no row to train on"):
        repeat_rows(ROWS[:0], DatasetSpec("b", rows=3), 1, 0)
    assert len(repeat_rows(ROWS[:0], DatasetSpec("b", weight=2.0), 1, 0)) == 0


def test_parts_are_known_by_where_they_begin() -> None:
    starts = np.asarray([0, 4, 4, 30])  # the second part has no row at all
    found = mix_rows(ROWS, starts, [DatasetSpec("a", weight=2.0), DatasetSpec("b"), DatasetSpec("c", rows=2)], 0)
    assert list(found[:4]) == [2, 2, 3, 3]
    assert len(found) == 6
    assert set(found[4:]) <= {5, 8, 13, 21}


def test_max_rows_comes_last_and_grows() -> None:
    few, more = limit_rows(np.arange(500), 20, 3), limit_rows(np.arange(500), 40, 3)
    assert (len(few), len(more)) == (20, 40)
    assert set(few) < set(more)  # so that a longer trial trains on the same rows and others
    assert limit_rows(ROWS, None, 0) is ROWS
    assert limit_rows(ROWS, 6, 0) is ROWS


@pytest.fixture
def mixed(tmp_path: Path, tokenizer: Any) -> Any:
    for name, count in (("a", 30), ("b", 12), ("c", 5)):
        write_rows(tmp_path / f"{name}.jsonl", [{"instruction": f"{name}{i}", "output": f"{i}"} for i in range(count)])

    def loads(path: str, *overrides: str) -> Data:
        path = path.replace("@", str(tmp_path))
        common = ["model=tiny", f"data.path={path}", "data.validation=8", "batch.global_size=4"]
        return load_data(load([*common, f"data.cache_dir={tmp_path}/cache", *overrides]), tokenizer)

    return loads


def test_a_mixture_holds_out_over_all_parts_and_then_weighs(mixed: Any) -> None:
    data = mixed("[{path:@/a.jsonl,weight:0.5},@/b.jsonl,{path:@/c.jsonl,rows:20}]")
    plain = mixed("[@/a.jsonl,@/b.jsonl,@/c.jsonl]")
    assert (len(plain.train), len(plain.validation), len(data.validation)) == (39, 8, 8)
    assert np.array_equal(plain.validation.indices, data.validation.indices), "weights leave the held-out rows alone"
    trained = {
        name: Counter(n for n in data.train.names(range(len(data.train))) if n.startswith(name)) for name in "abc"
    }
    left = Counter(n[0] for n in plain.train.names(range(39)))
    assert trained["a"].total() == max(1, round(left["a"] / 2))
    assert trained["b"].total() == left["b"]
    assert trained["c"].total() == 20
    held = set(data.validation.names(range(8)))
    assert not held & {name for names in trained.values() for name in names}
    assert len(data.parts) == 3
    assert data.fingerprint != plain.fingerprint
    assert len(mixed("[@/a.jsonl,{path:@/b.jsonl,weight:3}]", "data.max_rows=7").train) == 7


def test_rows_of_several_tables_are_concatenated(mixed: Any) -> None:
    data = mixed("[@/a.jsonl,@/b.jsonl,@/c.jsonl]", "data.validation=0")
    which = np.asarray([46, 0, 29, 30, 41, 42])
    assert data.train.names(which) == ["c.jsonl:5", "a.jsonl:1", "a.jsonl:30", "b.jsonl:1", "b.jsonl:12", "c.jsonl:1"]
    examples, tokens = data.train.examples(which), data.train.tokens(which)
    assert [e["answer"] for e in examples] == ["4", "0", "29", "0", "11", "0"]
    assert [t.ids.tolist() for t in tokens] == [e["input_ids"] for e in examples]
    assert [t.loss_mask.tolist() for t in tokens] == [e["labels"] for e in examples]
    assert list(data.train.lengths[which]) == [len(e["input_ids"]) for e in examples]
    assert list(data.train.prompt_lengths[which]) == [e["prompt_length"] for e in examples]
    assert data.train.label_tokens(which) == sum(sum(e["labels"]) for e in examples)
    separate = [mixed(f"@/{name}.jsonl", "data.validation=0").train.examples([0])[0] for name in "abc"]
    assert [data.train.examples([i])[0] for i in (0, 30, 42)] == separate


def test_equal_prompts_of_two_parts_stay_on_one_side(mixed: Any) -> None:
    data = mixed("[@/a.jsonl,{path:@/a.jsonl,weight:2}]")
    hashes = [set(rows.tables.hashes[0][rows.indices].tolist()) for rows in (data.train, data.validation)]
    assert not hashes[0] & hashes[1]
    assert len(data.validation) == 8
    assert len(hashes[1]) == 4
