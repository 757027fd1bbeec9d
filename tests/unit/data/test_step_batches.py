"""The batches of a step: the same with and without a thread, none for a step too many, errors at the step that asks."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.helpers.tokenizers import write_rows
from trainer.config import load
from trainer.data.batching.packing import Packing
from trainer.data.batching.rank_split import Limits
from trainer.data.load import load_data
from trainer.data.step_batches import StepBatches, StepLoader, StepSource

STEPS = 6


@pytest.fixture(scope="module", params=[True, False], ids=["trie", "padded"])
def source(request: pytest.FixtureRequest, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> StepSource:
    cache = tmp_path_factory.mktemp("cache")
    # two tables put together: rows are gathered from both
    write_rows(cache / "more.jsonl", [{"instruction": f"say {i}", "output": str(i)} for i in range(40)])
    paths = f"data.path=[{{path: examples/headlines/headlines.jsonl}}, {{path: {cache}/more.jsonl, weight: 2}}]"
    data = load_data(load(["debug=tiny", paths, f"data.cache_dir={cache}"]), tokenizer)
    return StepSource(
        rows=data.train,
        packing=Packing(request.param, Limits(None, 256), 0),
        seed=3,
        global_size=16,
        rank=1,
        world_size=2,
        device=torch.device("cpu"),
    )


@pytest.fixture
def loader(source: StepSource) -> Iterator[StepLoader]:
    loader = StepLoader(source, STEPS, prefetch=True)
    yield loader
    loader.close()
    assert threads() == []


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "step batches"]


def equal(one: StepBatches, other: StepBatches) -> bool:
    numbers = [(b.label_tokens, b.useful_tokens, b.computed_tokens, b.chosen.tolist()) for b in (one, other)]
    tensors = zip(one.batches, other.batches, strict=True)
    return numbers[0] == numbers[1] and all(
        torch.equal(x, y) for a, b in tensors for x, y in zip(a.tensors(), b.tensors(), strict=True)
    )


def test_a_thread_changes_nothing_in_any_order(source: StepSource, loader: StepLoader) -> None:
    for step in (0, 1, 2, 2, 5, 0, 4, 3, 4, 5):
        assert equal(loader.load(step), source.make(step))
        assert len(threads()) <= 1


def test_numbers_are_those_of_the_rows(source: StepSource) -> None:
    made = source.make(1)
    rows = source.rows.examples(made.chosen)
    assert made.useful_tokens == sum(len(row["input_ids"]) for row in rows)
    assert made.label_tokens == sum(sum(row["labels"][1:]) for row in rows)
    both = [b for rank in (0, 1) for b in replace(source, rank=rank).make(1).batches]
    assert made.computed_tokens == sum(b.computed_tokens for b in both)
    assert sorted(row for b in both for row in b.rows) == sorted(made.chosen.tolist())


def test_nothing_is_made_behind_the_last_step(source: StepSource, loader: StepLoader, monkeypatch: Any) -> None:
    made, make = [], StepSource.make

    def record(self: StepSource, step: int) -> StepBatches:
        made.append((step, threading.current_thread().name == "step batches"))
        return make(self, step)

    monkeypatch.setattr(StepSource, "make", record)
    for step in range(STEPS):
        loader.load(step)
    assert made == [(0, False), *((step, True) for step in range(1, STEPS))]
    made.clear()
    plain = StepLoader(source, STEPS)  # on CPU
    plain.load(0)
    assert made == [(0, False)]


def test_an_error_is_raised_at_its_step_with_its_traceback(source: StepSource) -> None:
    indices = source.rows.indices.copy()
    indices[source.make(1).chosen[5]] = 10**9  # not among the rows of the other steps of this pass
    broken = StepLoader(replace(source, rows=replace(source.rows, indices=indices)), STEPS, prefetch=True)
    assert equal(broken.load(0), source.make(0))
    with pytest.raises(IndexError) as caught:
        broken.load(1)
    assert {"make", "tokens"} <= {frame.name for frame in traceback.extract_tb(caught.value.__traceback__)}
    assert equal(broken.load(2), source.make(2)), "another step is made none the less"
    broken.close()


def test_rows_may_be_read_by_several_threads(source: StepSource) -> None:
    expected = [source.make(step) for step in range(STEPS)]
    names = source.rows.names(range(20))
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(source.make, step % STEPS) for step in range(5 * STEPS)]
        for _ in range(10):  # beside them, as an error's message does
            assert source.rows.names(range(20)) == names
        for step, future in enumerate(futures):
            assert equal(future.result(), expected[step % STEPS])
