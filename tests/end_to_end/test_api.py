"""docs/python.md as it stands there, in one process that trains run after run and is afterwards as it was before."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import warm
from tests.helpers.docs import blocks
from tests.helpers.processes import ROOT, run
from tests.helpers.read_trackers import READERS, assert_has_all

PAGE = ROOT / "docs" / "python.md"
STEPS = 8  # of 64 rows
RANK_8 = ["debug=tiny", "method.r=8", "batch.max_steps=20"]
BEFORE = """
import contextlib, io, json, logging, os, signal, sys, threading, warnings

def state():
    import torch
    umask = os.umask(0o022); os.umask(umask)
    loggers = [logging.getLogger(name) for name in ("trainer", "launch", "DeepSpeed", "transformers")]
    return [
        dict(os.environ), [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)],
        umask, sys.excepthook, list(warnings.filters), [(l.level, l.propagate, list(l.handlers)) for l in loggers[:2]],
        [l.level for l in loggers[2:]], torch.are_deterministic_algorithms_enabled(),
        torch.distributed.is_initialized(),
    ]

def parameters():
    import gc, torch
    gc.collect()
    return sum(type(thing) is torch.nn.Parameter for thing in gc.get_objects())

signal.signal(signal.SIGHUP, lambda *_: None)
before = state()
"""
AFTER = """
answer = loaded.answer("Say yes.")

class Interrupts(io.StringIO):
    def write(self, text):
        if text.startswith("step 3/"):
            signal.raise_signal(signal.SIGINT)
        return super().write(text)

config = trainer.load(["debug=tiny", "run.name=tracked", "run.deterministic=true", *TRACKERS])
with contextlib.redirect_stdout(Interrupts()):
    stopped = trainer.train(config)
resumed = trainer.train(config)
loaded = None
assert parameters() == 0, "a model is still there"
try:
    trainer.train(trainer.load(["debug=tiny", "run.name=failed", "optim.learning_rate=1e30"]))
    error = None
except trainer.TrainingError as caught:
    error = str(caught)
others = []
def train_elsewhere():
    config = trainer.load(["debug=tiny", "run.name=other", "zero=stage3", "method=full"])
    others.append(trainer.train(config))
thread = threading.Thread(target=train_elsewhere)
thread.start(); thread.join()
(other,) = others
assert state() == before, [(a, b) for a, b in zip(before, state()) if a != b]
with open("found.json", "w") as file:
    json.dump({
        "answer": answer, "losses": losses, "scores": scores, "error": error,
        "stopped": [stopped.status, stopped.steps, stopped.adapter],
        "resumed": [resumed.status, resumed.steps, str(resumed.adapter)],
        "other": [other.status, str(other.adapter)],
    }, file)
"""


@dataclass(frozen=True, slots=True)
class Page:
    """The folder that the page's blocks were run in, and what they have found."""

    folder: Path
    found: dict[str, Any]
    output: str


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Page:
    folder = tmp_path_factory.mktemp("page")
    code = "\n".join(block.text for block in blocks(PAGE) if block.language == "python")
    assert code.count('"experiment=demo"') == 2
    trackers = [name for name, package in {"tensorboard": "tensorboard", "mlflow": "mlflow"}.items() if has(package)]
    code = code.replace('"experiment=demo"', '"debug=tiny"')
    script = f"TRACKERS = ['log.trackers=[{','.join(trackers)}]']\n{BEFORE}\n{code}\n{AFTER}"
    done = run([sys.executable, "-c", script], cwd=folder, env={"PYTHONPATH": str(ROOT)}, timeout_seconds=400)
    return Page(folder, json.loads((folder / "found.json").read_text()), done.output)


def has(package: str) -> bool:
    try:
        __import__(package)
    except ImportError:
        return False
    return True


def test_its_examples_say_what_they_promise(page: Page) -> None:
    assert len(page.found["losses"]) == STEPS
    assert page.found["scores"].keys() == {"4", "8"}
    assert "method.rr=8: there is no such key → did you mean method.r=8" in page.output


def test_each_of_several_runs_is_to_the_byte_what_the_command_trains(page: Page, tmp_path: Path) -> None:
    warm.afina("train", *RANK_8, "run.name=rank-8", cwd=tmp_path)
    theirs, ours = (folder / "runs" / "rank-8" for folder in (tmp_path, page.folder))
    weights = Path("adapter") / "adapter_model.safetensors"
    assert (ours / weights).read_bytes() == (theirs / weights).read_bytes()
    assert (ours / "config.yaml").read_bytes() == (theirs / "config.yaml").read_bytes()
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (theirs, ours)]
    assert summaries[0]["metrics"] == summaries[1]["metrics"]


def test_its_model_answers_as_the_command_does(page: Page) -> None:
    command = ("generate", "runs/first", "Say yes.", "generate.max_new_tokens=20")
    done = warm.afina(*command, cwd=page.folder)
    assert page.found["answer"]
    assert page.found["answer"] in done.output


def test_it_stops_when_interrupted_and_goes_on(page: Page) -> None:
    status, steps, adapter = page.found["stopped"]
    assert (status, adapter) == ("preempted", None)
    assert 3 <= steps < STEPS
    assert page.found["resumed"] == ["finished", STEPS, str(page.folder / "runs" / "tracked" / "adapter")]


@pytest.mark.parametrize("name", READERS)
def test_trackers_have_the_numbers_of_the_metrics_file_after_a_resume(name: str, page: Page) -> None:
    assert_has_all(page.folder / "runs" / "tracked", name)


def test_an_error_leaves_the_process_to_the_next_run(page: Page) -> None:
    assert "not finite" in page.found["error"]
    assert json.loads((page.folder / "runs" / "failed" / "summary.json").read_text())["status"] == "failed"
    assert page.found["other"] == ["finished", str(page.folder / "runs" / "other" / "model")]
