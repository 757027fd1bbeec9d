"""A long stage says how far it is: a bar on a terminal, plain lines elsewhere, nothing on other ranks."""

from __future__ import annotations

import itertools
import os
import re
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.screen import Recording, record
from trainer.data.batching.rank_split import Limits, rows_a_round, split_padded
from trainer.tracking import counter as counter_module
from trainer.tracking.counter import ProgressCounter
from trainer.tracking.logs import configure_logging, current_handler, use_handler
from trainer.tracking.terminal import Terminal

names = (f"working on part {number}" for number in itertools.count())


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def name() -> str:
    return next(names)


def test_a_line_comes_at_the_start_and_each_30_seconds(name: str, clock: Clock, logged: list[str]) -> None:
    with ProgressCounter(name, 1000, now=clock) as counter:
        assert logged == [f"{name} 0/1,000"]
        for _ in range(100):
            clock.seconds += 1
            counter.advance(10)
    assert logged[1:] == [f"{name} 300/1,000 (0:30)", f"{name} 600/1,000 (1:00)", f"{name} 900/1,000 (1:30)"]


def test_a_stage_that_recurs_is_said_no_more_often(name: str, clock: Clock, logged: list[str]) -> None:
    for _ in range(20):
        with ProgressCounter(name, 2, recurs=True, now=clock) as counter:
            clock.seconds += 2
            counter.advance(2)
    assert logged == [f"{name} 0/2", f"{name} 2/2 (0:02)"], "two lines in 40 seconds"
    with ProgressCounter(name, 2, now=clock), ProgressCounter(name, 2, now=clock):
        pass
    assert logged[2:] == [f"{name} 0/2"] * 2, "what does not recur is always told"


def test_a_stage_that_hangs_in_one_call_says_so(
    name: str, clock: Clock, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counter_module, "LOOK_SECONDS", 0.01)
    with ProgressCounter(name, now=clock):
        clock.seconds += 31
        end = time.monotonic() + 60
        while len(logged) < 2 and time.monotonic() < end:
            time.sleep(0.01)
    assert logged == [name, f"{name} (0:31)"]


def test_what_has_no_total_counts_and_what_gets_one_shows_it(name: str, clock: Clock, logged: list[str]) -> None:
    with ProgressCounter(name, unit="rows", now=clock) as counter:
        counter.advance(1200)
        clock.seconds += 30
        counter.advance(34)
        clock.seconds += 30
        assert list(counter.over(iter("ab"), 2000)) == ["a", "b"]
    assert logged == [name, f"{name} 1,234 rows (0:30)", f"{name} 1,235/2,000 rows (1:00)"]


def test_other_ranks_and_programs_without_our_logging_show_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    configure_logging(rank=1)
    with ProgressCounter(next(names), 2) as counter:
        counter.advance()
    use_handler(None)
    with ProgressCounter(next(names), 2) as counter:
        counter.advance()
    assert capfd.readouterr() == ("", "")


def test_an_error_inside_ends_the_counter(name: str, clock: Clock, logged: list[str]) -> None:
    before = current_handler()
    with pytest.raises(KeyError), ProgressCounter(name, 2, now=clock):
        raise KeyError
    assert current_handler() is before
    assert logged == [f"{name} 0/2"]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_rank_counts_the_rows_of_all(world_size: int) -> None:
    import numpy as np

    lengths = np.asarray([5, 9, 1, 7, 7, 3, 2, 8, 8, 1, 4])
    micros = split_padded(lengths, world_size, Limits(2, 0))
    rounds = rows_a_round(micros)
    assert sum(rounds) == len(lengths)
    assert {len(rank) for rank in micros} == {len(rounds)}


def test_a_run_without_a_terminal_keeps_the_lines_in_its_log(tmp_path: Path, name: str, clock: Clock) -> None:
    terminal = Terminal(tmp_path, total_steps=3, resume_step=0)
    with ProgressCounter(name, 60, now=clock) as counter:
        for _ in range(60):
            clock.seconds += 1
            counter.advance()
    terminal.close()
    lines = [line.split(" ", 1)[1] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert lines == [f"{name} 0/60", f"{name} 30/60 (0:30)", f"{name} 60/60 (1:00)"]


STAGE = """
import logging, sys, time
from trainer.tracking.logs import configure_logging
from trainer.tracking.counter import ProgressCounter
configure_logging(stream=sys.stderr)
with ProgressCounter("evaluating", 256) as counter:
    for number in range(4):
        time.sleep(0.3)
        counter.advance(64)
        logging.getLogger("trainer").warning(f"odd {number}: " + "word " * 30)
print("the result")
"""


def stage(columns: int | None, code: str = STAGE, **env: str) -> Recording:
    shown = record([sys.executable, "-c", code], columns=columns, env=env, stdout_apart=True)
    assert shown.returncode == 0, shown.text
    assert shown.stdout == "the result\n"
    return shown


@pytest.mark.parametrize("columns", [40, 80, 120])
@pytest.mark.parametrize("no_color", [False, True])
def test_a_bar_stands_below_the_lines_and_goes(columns: int, no_color: bool) -> None:
    shown = stage(columns, **({"NO_COLOR": "1"} if no_color else {}))
    assert re.search(r"evaluating [━╸╺ ]*\d+/256 0:00:0", shown.text)
    assert shown.has_colours is not no_color
    lines = shown.screen()
    assert [line[:14] for line in lines if not line.startswith(" ")] == [f"warning: odd {n}" for n in range(4)]
    assert "evaluating" not in "\n".join(lines)
    assert max(map(len, lines)) <= columns
    assert all(line.endswith(("word", ":")) for line in lines), "a word was cut"
    assert shown.widest_line() <= columns


def test_a_dumb_terminal_and_a_pipe_get_lines(tmp_path: Path) -> None:
    for shown in (stage(80, TERM="dumb"), stage(None)):
        assert not shown.has_escapes
        assert shown.screen()[0] == "evaluating 0/256"
        assert shown.text.count("evaluating") == 1
    assert max(map(len, stage(None).screen())) > 120, "in a pipe lines are not wrapped: grep finds them whole"


RUN = """
import sys, time
from pathlib import Path
from trainer.tracking.counter import ProgressCounter
from trainer.tracking.terminal import Terminal
terminal = Terminal(Path(sys.argv[1]), total_steps=150, resume_step=0)
with ProgressCounter("evaluating", 256) as counter:
    time.sleep(0.6)
    counter.advance(96)
    time.sleep(0.6)
terminal.step({"step": 1, "loss": 0.5})
terminal.close()
"""


@pytest.mark.parametrize("columns", [80, 120])
def test_the_bar_of_a_run_shows_its_evaluation_instead_of_the_steps(columns: int, tmp_path: Path) -> None:
    shown = record([sys.executable, "-c", RUN, os.fspath(tmp_path)], columns=columns)
    during = shown.screen_at(next(at for at, text in shown.chunks if "96/256" in text))
    assert [line.split()[0] for line in during] == ["evaluating"], "one line: what goes on now"
    assert "1/150" in shown.text, "then the steps again"
    assert shown.screen() == [""], "the bar goes with the run"
    assert shown.widest_line() <= columns
    assert "evaluating" not in (tmp_path / "log.txt").read_text()
