"""A finished run answers at once, without torch, where nothing that it was made from has changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT
from tests.helpers.tokenizers import write_rows
from trainer.checkpoint.finished import _sources, answer_of_finished
from trainer.config import load, to_yaml

SUMMARY = {"status": "finished", "steps": 4, "wall_seconds": 7.0, "metrics": {"eval_loss": 1.5}, "error": None}


class Finished:
    """A run of four rows that has finished, a minute ago."""

    def __init__(self, folder: Path, status: str = "finished") -> None:
        folder.mkdir(exist_ok=True)
        self.rows = write_rows(folder / "rows.jsonl", [{"instruction": "a", "output": "b"}] * 4)
        self.keys = ["model=tiny", f"data.path={self.rows}", "run.name=one", f"run.dir={folder / 'runs'}"]
        run = folder / "runs" / "one"
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(to_yaml(load(self.keys)))
        (run / "summary.json").write_text(json.dumps({**SUMMARY, "status": status}))
        os.utime(run / "summary.json", (time.time() + 60,) * 2)

    def answer(self, *overrides: str) -> list[str] | None:
        return answer_of_finished(load([*self.keys, *overrides]))


def test_it_answers_with_the_end_of_the_run(tmp_path: Path) -> None:
    answer = Finished(tmp_path).answer("log.wandb=off", "batch.micro_tokens=2048")
    assert answer is not None
    assert "nothing is redone" in answer[0]
    assert answer[1] == "eval_loss: 1.5000"
    assert answer[2].startswith("finished 4 steps in 7 s: ")


@pytest.mark.parametrize("override", ["method.r=3", "batch.epochs=9", "run.overwrite=true", "run.name=two"])
def test_what_must_be_looked_at_in_full(override: str, tmp_path: Path) -> None:
    assert Finished(tmp_path).answer(override) is None


@pytest.mark.parametrize("status", ["failed", "preempted"])
def test_an_unfinished_run_has_no_answer(status: str, tmp_path: Path) -> None:
    assert Finished(tmp_path, status).answer() is None


def test_rows_that_may_have_changed_are_looked_at_in_full(tmp_path: Path) -> None:
    finished = Finished(tmp_path)
    os.utime(tmp_path / "runs" / "one" / "summary.json", (1, 1))
    assert finished.answer() is None
    # an older file that takes the place of the rows keeps its own time
    other = Finished(tmp_path / "other")
    old = write_rows(tmp_path / "old.jsonl", [{"instruction": "c", "output": "d"}] * 4)
    os.utime(old, (1, 1))
    os.utime(tmp_path / "other" / "runs" / "one" / "summary.json", (time.time() - 1,) * 2)
    old.replace(other.rows)
    assert other.answer() is None


@pytest.mark.parametrize("path", ["{0}", "{0}/*/part*.jsonl", "[{0}/a/part-0.jsonl]", "[{{path: {0}/a, weight: 2}}]"])
def test_each_way_to_name_rows_is_looked_at(path: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "a").mkdir(parents=True)
    write_rows(data / "a" / "part-0.jsonl", [{"instruction": "a", "output": "b"}] * 4)
    config = load(["model=tiny", f"data.path={path.format(data)}", "run.name=one"], with_data=False)
    assert str(data / "a" / "part-0.jsonl") in {os.path.normpath(file) for file in _sources(config)}


def test_a_summary_that_cannot_be_read_is_left_to_the_start(tmp_path: Path) -> None:
    finished = Finished(tmp_path)
    (tmp_path / "runs" / "one" / "summary.json").write_text("{")
    assert finished.answer() is None


def test_the_command_loads_no_torch(tmp_path: Path) -> None:
    finished = Finished(tmp_path)
    code = (
        "import sys, trainer.cli.app; code = trainer.cli.app.main(['train', *sys.argv[1:]]);"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules], code)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, *finished.keys], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert answer.stdout.splitlines()[-1] == "[] 0", answer.stdout + answer.stderr
    assert "nothing is redone" in answer.stdout
