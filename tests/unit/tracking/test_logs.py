"""What is logged is printed once, plainly, by rank 0, and in the open run's terminal."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT
from trainer.tracking.logs import LineHandler, configure_logging, use_handler
from trainer.tracking.terminal import Terminal

logger = logging.getLogger("trainer.somewhere")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = use_handler(None)
    yield
    use_handler(before)


def log_some() -> None:
    logger.debug("detail")
    logger.info("100 % {of} it")
    logger.warning("odd")
    logger.warning("warning: odd again")
    logging.getLogger("launch.trials").info("two\nlines")
    logger.error("broken")


def test_lines_are_plain_and_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    configure_logging()
    log_some()
    plain = "100 % {of} it\nwarning: odd\nwarning: odd again\ntwo\nlines\nerror: broken\n"
    assert capsys.readouterr() == (plain, "")
    stream = io.StringIO()
    configure_logging(stream=stream)
    log_some()
    assert (stream.getvalue(), capsys.readouterr()) == (plain, ("", ""))


def test_other_ranks_print_errors_alone(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(rank=3)
    log_some()
    assert capsys.readouterr() == ("[rank 3] error: broken\n", "")


def test_a_root_handler_prints_nothing_again(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.StreamHandler(sys.stdout)
    logging.getLogger().addHandler(root)
    try:
        configure_logging()
        logger.warning("odd")
    finally:
        logging.getLogger().removeHandler(root)
    assert capsys.readouterr().out == "warning: odd\n"


def test_an_open_terminal_takes_the_lines_and_gives_them_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = io.StringIO()
    configure_logging(stream=stream)
    terminal = Terminal(tmp_path, total_steps=1, resume_step=0)
    logger.warning("odd")
    terminal.stop_bar()
    logger.info("late")
    terminal.close()
    logger.info("after")
    assert capsys.readouterr().out == "warning: odd\nlate\n"
    assert [line.split(" ", 1)[1] for line in (tmp_path / "log.txt").read_text().splitlines()] == [
        "warning: odd",
        "late",
    ]
    assert stream.getvalue() == "after\n"


def test_a_terminal_that_closes_late_leaves_the_next_one_its_lines(tmp_path: Path) -> None:
    lines: list[str] = []
    first = Terminal(tmp_path, total_steps=1, resume_step=0)
    use_handler(LineHandler(lines.append))
    first.close()
    logger.info("here")
    assert lines == ["here"]


@pytest.mark.parametrize("close", ["sys.stdout.close()", "os.close(1)"])
def test_a_closed_stdout_stops_nothing(close: str) -> None:
    code = (
        "import logging, os, sys; from trainer.tracking.logs import configure_logging; configure_logging();"
        f"{close}; logging.getLogger('trainer').info('x'); logging.getLogger('trainer').info('y');"
        "sys.stderr.write('alive')"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (answer.returncode, answer.stderr) == (0, "alive")


def test_letters_that_the_stream_does_not_have_are_replaced() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    configure_logging(stream=stream)
    logger.info("4 × 2")
    assert stream.buffer.getvalue() == b"4 ? 2\n"  # type: ignore[attr-defined]
