"""A run that was moved to another machine: its base is found again, or the error says how to name it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.helpers.finished_run import finished
from tests.helpers.warm import afina
from trainer.cli import main
from trainer.methods.base_record import read_base
from trainer.models.embedded import MARKER, fetch

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_model, tmp_path / "here" / "base")
    (tmp_path / "here" / "base" / MARKER).unlink()
    return tmp_path / "here" / "base"


def answer(capsys: Capture, run: Path, *overrides: str) -> str:
    capsys.readouterr()
    assert main(["generate", str(run), "What is b?", "generate.max_new_tokens=8", *overrides]) == 0
    return capsys.readouterr().out


def refused(capsys: Capture, run: Path, *overrides: str) -> str:
    capsys.readouterr()
    assert main(["generate", str(run), "What is b?", *overrides]) != 0
    error = capsys.readouterr().err.splitlines()
    assert len([line for line in error if line.startswith("error: ")]) == 1
    return error[-1]


def test_a_trained_run_goes_to_another_machine_with_its_base(base: Path, tmp_path: Path) -> None:
    """Trained, moved, scored: the one test here whose adapter training itself has written."""
    here, there = base.parent, tmp_path / "there"
    keys = ["debug=tiny", "run.name=one", "batch.max_steps=1", "eval.metrics=[loss]", "eval.before=false"]
    afina("train", *keys, f"model.name_or_path={base}", cwd=here)
    for folder in [here / "runs" / "one" / "adapter", *(here / "runs" / "one").glob("checkpoints/*/adapter")]:
        record = read_base(folder)
        assert record is not None
        assert (record.name, record.kind, record.path) == (str(base), "folder", str(base))
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    scored = afina("eval", "one", cwd=here).output
    here.rename(there)
    done = afina("eval", "one", cwd=there, check=False)
    assert done.returncode == 2
    assert (
        f"model.name_or_path={base}: is the folder of the base of runs/one, and is not on this machine" in done.output
    )
    assert "say where it is now: model.name_or_path=FOLDER" in done.output
    again = afina("eval", "one", f"model.name_or_path={there}/base", cwd=there).output
    assert [line for line in again.splitlines() if line.startswith("eval_loss")] == [
        line for line in scored.splitlines() if line.startswith("eval_loss")
    ]
    assert "other weights" not in again


def test_an_embedded_base_is_fetched_where_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """By its name, and by the path that it had in another cache."""
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "cache"))
    runs = [finished(tmp_path, "name"), finished(tmp_path, "path", f"model.name_or_path={fetch('tiny')}")]
    before = [answer(capsys, run) for run in runs]
    (tmp_path / "cache").rename(tmp_path / "gone")
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "other"))
    (tmp_path / "runs").rename(tmp_path / "moved")
    assert [answer(capsys, tmp_path / "moved" / run.name) for run in runs] == before
    assert (tmp_path / "other" / "models" / "tiny" / MARKER).is_file()
    assert not (tmp_path / "cache").exists()


def test_a_base_that_was_typed_relative_is_found_from_elsewhere(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(base.parent)
    run = finished(tmp_path, "one", "model.name_or_path=base")
    before = answer(capsys, run)
    monkeypatch.chdir(tmp_path)
    assert answer(capsys, run) == before
    base.rename(tmp_path / "else")
    assert "model.name_or_path=base: is the folder of the base of" in refused(capsys, run)
    assert answer(capsys, run, f"model.name_or_path={tmp_path}/else") == before


def test_another_base_is_named_with_the_one_that_it_is_not(base: Path, tmp_path: Path, capsys: Capture) -> None:
    run = finished(tmp_path, "one", f"model.name_or_path={base}")
    answer(capsys, run)
    assert "other weights" not in capsys.readouterr().err
    like = tmp_path / "like"
    shutil.copytree(base, like)
    tensors: dict[str, Any] = load_file(like / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, like / "model.safetensors", {"format": "pt"})
    assert main(["generate", str(run), "x", f"model.name_or_path={like}", "generate.max_new_tokens=1"]) == 0
    told = capsys.readouterr().err
    assert f"warning: one was trained on {base}, and the base here, {like}, has other weights or another dtype" in told


def test_a_run_without_a_record_is_found_as_before(base: Path, tmp_path: Path, capsys: Capture) -> None:
    run = finished(tmp_path, "one", f"model.name_or_path={base}")
    before = answer(capsys, run)
    (run / "adapter" / "base.json").unlink()
    assert answer(capsys, run) == before
    base.rename(tmp_path / "else")
    assert "say where it is now" in refused(capsys, run)
    assert answer(capsys, run, f"model.name_or_path={tmp_path}/else") == before
