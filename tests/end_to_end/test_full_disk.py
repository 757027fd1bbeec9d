"""A disk that takes no more: a limit on the size of files stands in for it, met by every library that writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.processes import Finished
from tests.helpers.warm import afina

KEYS = ["train", "debug=tiny", "optim.learning_rate=0.01", "eval.metrics=[loss]", "checkpoint.every_steps=2"]


def limited(work: Path, limit_bytes: int | None, *arguments: str) -> Finished:
    return afina(*arguments, file_bytes=limit_bytes, cwd=work, check=False)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with a finished run in it: how large its files are, and the tables cached."""
    folder = tmp_path_factory.mktemp("full-disk")
    whole = limited(folder, None, *KEYS, "run.name=whole")
    assert whole.returncode == 0, whole.output
    return folder


def size(work: Path, file: str) -> int:
    found, *_ = (work / "runs" / "whole").glob(file)
    return found.stat().st_size


def test_a_checkpoint_that_does_not_fit_costs_a_warning(work: Path) -> None:
    state = size(work, "checkpoints/*/state.safetensors")
    done = limited(work, state - 1, *KEYS, "run.name=narrow")
    assert done.returncode == 0, done.output
    assert "could not be written (Error while serializing: I/O error: File too large" in done.output
    assert (work / "runs" / "narrow" / "adapter" / "adapter_model.safetensors").exists()
    assert json.loads((work / "runs" / "narrow" / "summary.json").read_text())["status"] == "finished"


def test_an_adapter_that_does_not_fit_is_said_and_saved_by_the_same_command(work: Path) -> None:
    adapter = size(work, "adapter/adapter_model.safetensors")
    lost = limited(work, adapter - 1, *KEYS, "run.name=none")
    assert lost.returncode == 3, lost.output
    assert "Traceback" not in lost.output
    assert lost.output.splitlines()[-1].startswith("error: writing: the disk takes no more: File too large → make room")
    again = limited(work, None, *KEYS, "run.name=none")
    assert again.returncode == 0, again.output
    assert (work / "runs" / "none" / "adapter" / "adapter_model.safetensors").exists()


def test_a_merge_that_does_not_fit_leaves_nothing(work: Path) -> None:
    lost = limited(work, 10_000, "merge", "runs/whole", "--to", "merged")
    assert lost.returncode == 3, lost.output
    assert "Traceback" not in lost.output
    assert "the disk takes no more" in lost.output.splitlines()[-1]
    assert not list(work.glob("merged*"))
