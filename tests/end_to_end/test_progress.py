"""No verb is silent: a line at once, then how far it is, fitted to the terminal; in a pipe plain lines."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.helpers.screen import Recording, afina, record, record_warm

# Of a cold start on a machine that does other things as well; on a quiet one it is half a second.
FIRST_LINE_SECONDS = 15
TRAIN = ["train", "debug=tiny", "log.wandb=off", "run.name=first"]
EVALUATING = re.compile(r"evaluating [━╸╺ ]*\d+/8")

SHAPES = [
    pytest.param(80, {}, id="80 columns"),
    pytest.param(120, {}, id="120 columns"),
    pytest.param(80, {"NO_COLOR": "1"}, id="NO_COLOR"),
    pytest.param(None, {}, id="pipe"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run in runs/first."""
    folder = tmp_path_factory.mktemp("home")
    assert record_warm(*TRAIN, columns=None, cwd=folder).returncode == 0
    return folder


def checked(shown: Recording, env: dict[str, str]) -> Recording:
    assert shown.returncode == 0, shown.text
    if shown.columns is None:
        assert not shown.has_escapes
    else:
        assert shown.widest_line() <= shown.columns, "a line is wider than the terminal"
        assert shown.has_escapes
        assert "NO_COLOR" not in env or not shown.has_colours
    return shown


@pytest.mark.parametrize(("columns", "env"), SHAPES)
def test_training_shows_each_stage(columns: int | None, env: dict[str, str], tmp_path: Path) -> None:
    shown = checked(record_warm(*TRAIN, columns=columns, env=env, cwd=tmp_path), env)
    for stage in ("loading tiny", "verifying packing and kernels", "starting DeepSpeed", "generating answers"):
        assert stage in shown.text
    assert EVALUATING.search(shown.text)
    log = (tmp_path / "runs/first/log.txt").read_text()
    assert log.count("evaluating") == (1 if columns is None else 0), "bars are not logged, lines as they are shown"


@pytest.mark.parametrize(("columns", "env"), SHAPES)
def test_scoring_shows_how_far_it_is(columns: int | None, env: dict[str, str], home: Path) -> None:
    shown = checked(record_warm("eval", "runs/first", columns=columns, env=env, cwd=home), env)
    assert EVALUATING.search(shown.text)
    if columns:
        assert "evaluating" not in "\n".join(shown.screen()), "the bar goes"


@pytest.mark.parametrize(("columns", "env"), SHAPES)
def test_generating_merging_and_data_show_their_stages(
    columns: int | None, env: dict[str, str], home: Path, tmp_path: Path
) -> None:
    shown = checked(record_warm("generate", "runs/first", "hello", columns=columns, env=env, cwd=home), env)
    assert re.search(r"generating [━╸╺ ]*\d/4 tokens", shown.text)
    merged = f"merged-{columns}-{len(env)}"
    shown = checked(record_warm("merge", "runs/first", "--to", merged, columns=columns, env=env, cwd=home), env)
    for stage in ("comparing logits", "folding", "hashing", "writing the merged model", f"loading {merged}"):
        assert stage in shown.text
    env = {**env, "AFINA_CACHE": str(tmp_path / "cache")}
    shown = checked(record_warm("data", "debug=tiny", columns=columns, env=env, cwd=home), env)
    assert "preparing headlines.jsonl" in shown.text
    assert "measuring lengths" in shown.text


@pytest.mark.slow
def test_the_first_line_comes_at_once_and_a_pipe_gets_the_result_alone(home: Path) -> None:
    """Cold, as a user starts them."""
    shown = record(afina("eval", "runs/first"), columns=80, cwd=home)
    assert shown.first_line_seconds < FIRST_LINE_SECONDS
    assert "loading libraries" in shown.text
    shown = record(afina("generate", "runs/first", "hello"), columns=80, cwd=home, stdout_apart=True)
    assert shown.first_line_seconds < FIRST_LINE_SECONDS
    assert "generating" in shown.text
    assert not set("\x1b\r") & set(shown.stdout)
    assert len(shown.stdout.splitlines()) <= 4, "an answer of four tokens"
    shown = record([sys.executable, "-m", "trainer.train", *TRAIN[1:]], columns=None, cwd=home)
    assert shown.screen()[0] == "loading libraries"
    assert shown.first_line_seconds < FIRST_LINE_SECONDS
    assert json.loads((home / "runs/first/summary.json").read_text())["status"] == "finished"
