"""Worker processes: light, in order, and gone with their parent, however it goes."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from trainer.data.prepare.encode import Encoder, EncodingSpec
from trainer.data.prepare.workers import encode_chunks
from trainer.data.sources.rows import Chunk
from trainer.errors import DataError

pytestmark = pytest.mark.slow


def chunks(number: int, rows: int = 20) -> Iterator[Chunk]:
    for i in range(number):
        lines = (json.dumps({"instruction": f"Say {i}", "output": f"{j}"}).encode() for j in range(rows))
        yield Chunk(0, "a.jsonl", i * rows + 1, tuple(lines))


@pytest.fixture
def spec(tokenizer: Any) -> EncodingSpec:
    return EncodingSpec(tokenizer, "alpaca", {}, "chat", "user", "completion", 200, "error")


def serving(parent: int | None = None) -> list[psutil.Process]:
    """The workers below a process: others may have children of their own there, dead ones among them."""
    alive = [p for p in psutil.Process(parent).children() if p.status() != psutil.STATUS_ZOMBIE]
    return [p for p in alive if "trainer.data.prepare.workers" in " ".join(p.cmdline())]


def gone(processes: list[psutil.Process], seconds: float = 60) -> bool:
    return not psutil.wait_procs(processes, timeout=seconds)[1]


def test_workers_are_light_and_work_ahead_a_little_only(spec: EncodingSpec) -> None:
    read: list[int] = []

    def watched() -> Iterator[Chunk]:
        for chunk in chunks(40):
            read.append(chunk.line)
            yield chunk

    encoded = encode_chunks(watched(), spec, 2)
    for taken, (one, chunk) in enumerate(zip(encoded, chunks(40), strict=True), 1):
        assert one.rows == Encoder(spec).encode(chunk).rows
        assert len(read) - taken <= 5
        if taken == 1:
            workers = serving()
            assert len(workers) == 2
            loaded = {os.path.basename(m.path) for worker in workers for m in worker.memory_maps()}
            assert not [name for name in loaded if name.startswith(("libtorch", "pandas"))]
    assert gone(workers)


def test_leaving_early_leaves_no_worker(spec: EncodingSpec) -> None:
    encoded = encode_chunks(chunks(1000), spec, 2)
    next(encoded)
    workers = serving()
    assert len(workers) == 2
    encoded.close()
    assert gone(workers)


def test_a_worker_that_dies_is_an_error(spec: EncodingSpec) -> None:
    encoded = encode_chunks(chunks(1000), spec, 2)
    next(encoded)
    workers = serving()
    workers[0].kill()
    with pytest.raises(DataError, match=r"data\.workers: a process that tokenises was killed by SIGKILL"):
        list(encoded)
    assert gone(workers)


def test_a_wrong_template_is_the_error_of_one_process(spec: EncodingSpec) -> None:
    wrong = dataclasses.replace(spec, template="no/such.jinja")
    errors = []
    for workers in (1, 2):
        with pytest.raises(DataError) as caught:
            next(encode_chunks(chunks(3), wrong, workers))
        errors.append((str(caught.value), caught.value.what, caught.value.hint))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_worker_outlives_its_parent(spec: EncodingSpec, number: signal.Signals) -> None:
    def parent() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what is in its background without it
        for _ in encode_chunks(chunks(10**9), spec, 2):
            ready.set()

    context = multiprocessing.get_context("fork")
    ready = context.Event()
    child = context.Process(target=parent)
    child.start()
    assert ready.wait(60)
    workers = serving(child.pid)
    assert len(workers) == 2
    begin = time.monotonic()
    os.kill(child.pid or 0, number)
    child.join(60)
    assert child.exitcode
    assert gone(workers, 30), f"{time.monotonic() - begin:.0f} s later"


def test_a_scheduler_that_signals_every_process_stops_no_worker(spec: EncodingSpec) -> None:
    encoded = encode_chunks(chunks(30), spec, 2)
    next(encoded)
    for worker in serving():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            worker.send_signal(number)
    assert len(list(encoded)) == 29
