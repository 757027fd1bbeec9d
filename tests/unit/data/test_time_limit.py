"""Code that does not end is ended; what ends in time is not touched, however often it runs."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from tests.helpers.tokenizers import llama3_like
from trainer.data.templates import renderer
from trainer.data.templates.template import Template
from trainer.data.templates.time_limit import TimeLimit, TimeLimitExceeded
from trainer.errors import DataError


def for_ever(limit: TimeLimit) -> None:
    with limit.limited():
        while True:
            pass


def test_a_loop_is_ended_and_the_next_block_is_not() -> None:
    limit = TimeLimit(0.2)
    with pytest.raises(TimeLimitExceeded):
        for_ever(limit)
    for _ in range(20_000):
        with limit.limited():
            pass
    time.sleep(1.2)  # nothing comes late


def test_threads_are_bounded_one_by_one() -> None:
    limit, ended = TimeLimit(0.2), []

    def loop() -> None:
        try:
            for_ever(limit)
        except TimeLimitExceeded:
            ended.append(threading.get_ident())

    threads = [threading.Thread(target=loop) for _ in range(2)]
    for thread in threads:
        thread.start()
    with pytest.raises(TimeLimitExceeded):
        for_ever(limit)
    for thread in threads:
        thread.join(20)
    assert len(ended) == 2


def test_a_template_that_loops_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renderer, "_TIME_LIMIT", TimeLimit(0.3))
    file = tmp_path / "loop.jinja"
    nested = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    file.write_text(nested + "{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(DataError, match=r"loop\.jinja: does not end within 0 s"):
        Template(llama3_like(), str(file))
