"""Checkpoints on disk: whole or not there, and every broken file is named together with the newest good one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.logged import logged_lines
from trainer.checkpoint import commit, tensors
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.resume import find_resume_point, verify
from trainer.config.schema import CheckpointConfig, MethodConfig
from trainer.errors import CheckpointError
from trainer.files import atomic as files
from trainer.files import manifest
from trainer.methods import attach, create_runtime, runtime, trainable_parameters

FILES = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "state.safetensors", "state.json")


class Run:
    """A run folder whose checkpoints are written by the project's own code, engine and collectives left out."""

    resume = "auto"

    def __init__(self, folder: Path, model: Any) -> None:
        self.folder, self.checkpoints = folder, folder / "checkpoints"
        self.model = attach(model, MethodConfig(r=2, target_modules=["q_proj"]), seed=0)
        self.runtime = create_runtime(self.model, MethodConfig(r=2))
        self.weights = {n: p.detach() for n, p in trainable_parameters(self.model).items()}

    def write(self, step: int) -> Path:
        final = self.checkpoints / f"step-{step:08d}"
        partial = final.with_name(final.name + ".partial")
        state = {f"weight/{n}": t.clone() for n, t in self.weights.items()}
        engine: Any = SimpleNamespace(model=self.model, runtime=self.runtime)
        config = CheckpointConfig(resume=self.resume)
        writer = Checkpointer(engine=engine, run_dir=self.folder, run_identity={}, config=config)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        failure = writer._write_adapter(partial, state, self.weights)
        if failure is not None:
            raise CheckpointError(str(partial), reason=failure)
        (partial / "state.json").write_text(json.dumps({"step": step, "resume": self.resume}))
        commit.commit(partial, final)
        return final


@pytest.fixture
def run(tmp_path: Path, model: Any) -> Run:
    return Run(tmp_path / "run", model)


def test_a_checkpoint_names_every_file_of_its_own(run: Run) -> None:
    folder = run.write(3)
    marker = json.loads((folder / "COMPLETE").read_text())
    there = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()} - {"COMPLETE"}
    assert set(marker) == there >= set(FILES)
    assert [f.name for f in run.checkpoints.iterdir()] == ["step-00000003"]
    verify(folder, run.folder)


def test_auto_takes_the_newest_complete_one(run: Run) -> None:
    assert find_resume_point(run.folder, "auto") is None
    run.checkpoints.mkdir(parents=True)
    assert find_resume_point(run.folder, "auto") is None
    folders = [run.write(step) for step in (9, 10, 100)]
    assert find_resume_point(run.folder, "auto") == folders[-1]
    (folders[-1] / "COMPLETE").unlink()
    assert find_resume_point(run.folder, "auto") == folders[1]
    assert find_resume_point(run.folder, "never") is None


def test_a_partial_one_is_never_found(run: Run) -> None:
    good = run.write(3)
    for name in ("step-00000009.partial", "step-00000008.partial"):
        shutil.copytree(good, run.checkpoints / name)  # even with a marker in it
    (run.checkpoints / "step-00000007").mkdir()
    (run.checkpoints / "step-00000007" / "COMPLETE.partial").write_text("{}")
    assert find_resume_point(run.folder, "auto") == good


def broken(how: str, file: Path) -> None:
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "shorter":
        file.write_bytes(content[:-1])
    elif how == "longer":
        file.write_bytes(content + b"\0")
    else:
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


@pytest.mark.parametrize("how", ["missing", "empty", "shorter", "longer", "flipped"])
@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_is_named_with_the_newest_good_checkpoint(run: Run, how: str, name: str) -> None:
    first, good, worse, newest = (run.write(step) for step in (1, 2, 3, 4))
    broken("flipped", worse / "state.json")
    broken(how, newest / name)
    for resume in ("strict", str(newest)):
        with pytest.raises(CheckpointError) as caught:
            find_resume_point(run.folder, resume)
        message = str(caught.value)
        assert str(newest / name) in message
        assert message.endswith(f"checkpoint.resume={good}")
    assert find_resume_point(run.folder, str(first)) == first
    with logged_lines() as logged:
        assert find_resume_point(run.folder, "auto") == good
    assert any(str(newest / name) in line and "corrupt-0-step-00000004" in line for line in logged)
    assert names(run) == ["corrupt-0-step-00000003", "corrupt-0-step-00000004", "step-00000001", "step-00000002"]
    assert find_resume_point(run.folder, "strict") == good


def test_without_a_good_one_the_way_to_start_afresh_is_named(run: Run) -> None:
    broken("missing", run.write(1) / "state.json")
    with pytest.raises(CheckpointError, match=r"checkpoint\.resume=never run\.overwrite=true starts afresh"):
        find_resume_point(run.folder, "auto")


@pytest.mark.parametrize("name", ["", "nothing", "step-00000001.partial"])
def test_a_named_folder_must_be_complete(run: Run, name: str) -> None:
    good = run.write(2)
    (run.checkpoints / "step-00000001.partial").mkdir()
    with pytest.raises(CheckpointError) as caught:
        find_resume_point(run.folder, str(run.checkpoints / name))
    assert "no readable COMPLETE marker" in str(caught.value)
    assert str(caught.value).endswith(f"checkpoint.resume={good}")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_any_flipped_bit_of_any_file_is_found(run: Run, data: st.DataObject) -> None:
    folder = run.checkpoints / "step-00000001"
    if not folder.exists():
        run.write(1)
    name = data.draw(st.sampled_from([*FILES, "COMPLETE"]))
    content = (folder / name).read_bytes()
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    (folder / name).write_bytes(bytes(changed))
    try:
        with pytest.raises(CheckpointError) as caught:
            find_resume_point(run.folder, "auto")
        assert str(folder) in str(caught.value)
    finally:
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    "marker", ["[]", "null", "3", '{"state.json": 1}', '{"state.json": {"bytes": 1}}', "", "\ufeff"]
)
def test_a_marker_that_says_something_else(run: Run, marker: str) -> None:
    folder = run.write(1)
    (folder / "COMPLETE").write_text(marker)
    with pytest.raises(CheckpointError, match="no readable COMPLETE marker"):
        find_resume_point(run.folder, "auto")


def names(run: Run) -> list[str]:
    return sorted(f.name for f in run.checkpoints.iterdir())


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (2, [4, 5]), (3, [2, 4, 5]), (9, [1, 2, 4, 5])])
def test_keep_deletes_older_complete_ones_only(run: Run, keep: int, left: list[int]) -> None:
    for step in (1, 2, 3, 4, 5):
        run.write(step)
    (run.checkpoints / "step-00000003" / "COMPLETE").unlink()
    (run.checkpoints / "step-00000006.partial").mkdir()
    (run.checkpoints / "notes").mkdir()
    commit.delete_old(run.checkpoints, keep)
    steps = sorted({*left, 3})
    assert names(run) == sorted([*(f"step-{s:08d}" for s in steps), "step-00000006.partial", "notes"])


@pytest.mark.parametrize(
    ("best", "left"), [(1, [1, 5]), (4, [4, 5]), (5, [5]), (3, [5]), (None, [5])], ids="best {}".format
)
def test_the_best_is_kept_beside_the_newest(run: Run, best: int | None, left: list[int]) -> None:
    folders = {step: run.write(step) for step in (1, 2, 4, 5)}
    for _ in range(2):
        commit.delete_old(run.checkpoints, 1, best)
        assert names(run) == [folders[step].name for step in left]
    assert find_resume_point(run.folder, "auto") == folders[5], "a run goes on from the newest, not from the best"
    newer = run.write(6)
    commit.delete_old(run.checkpoints, 1, 6)
    assert names(run) == [newer.name]


def test_a_broken_newest_one_names_the_best_as_a_good_one(run: Run) -> None:
    folders = {step: run.write(step) for step in (1, 2, 3)}
    commit.delete_old(run.checkpoints, 1, 1)
    broken("flipped", folders[3] / "state.json")
    with pytest.raises(CheckpointError) as caught:
        find_resume_point(run.folder, "strict")
    assert str(caught.value).endswith(f"checkpoint.resume={folders[1]}")
    commit.archive_after(run.folder, 1)
    assert find_resume_point(run.folder, "auto") == folders[1]


def test_a_kill_while_deleting_leaves_nothing_that_looks_complete(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = run.write(1), run.write(2)

    def killed(_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            commit.delete_old(run.checkpoints, 1)
    assert first.exists()
    assert not (first / "COMPLETE").exists()
    assert find_resume_point(run.folder, "auto") == second


@pytest.mark.parametrize(
    ("room", "killed_in"),
    [
        (files, "sync"),
        (manifest, "sha256"),
        (files, "write_atomically"),
        (tensors, "save_file"),
        (runtime, "save_adapter"),
    ],
)
def test_a_kill_while_writing_leaves_the_one_before(
    run: Run, monkeypatch: pytest.MonkeyPatch, room: Any, killed_in: str
) -> None:
    """At every call of every step of the writing, also of a step that is written again."""
    good = run.write(1)
    original = getattr(room, killed_in)
    survived = 0
    while True:
        left = iter(range(survived))

        def killed(*args: Any, left: Any = left, **keys: Any) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return original(*args, **keys)

        with monkeypatch.context() as patch:
            patch.setattr(room, killed_in, killed)
            try:
                run.write(2)
            except KeyboardInterrupt:
                survived += 1
            else:
                break
        found = find_resume_point(run.folder, "auto")
        # the marker's own folder entry may be synced last: by then the new one is whole
        assert found is not None
        assert found == good or commit.find_corruption(found) is None
        shutil.rmtree(run.checkpoints / "step-00000002", ignore_errors=True)
    assert survived >= 1
    assert find_resume_point(run.folder, "auto") == run.checkpoints / "step-00000002"
    assert not list(run.checkpoints.glob("*.partial"))


def test_state_that_does_not_read_back_is_not_published(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    good = run.write(1)
    with monkeypatch.context() as patch:
        write = tensors.save_file
        patch.setattr(tensors, "save_file", lambda state, file: write({n: t + 1 for n, t in state.items()}, file))
        with pytest.raises(CheckpointError, match=r"state\.safetensors: does not read back"):
            run.write(2)
    assert find_resume_point(run.folder, "auto") == good


def test_going_back_sets_the_later_ones_aside(run: Run) -> None:
    folders = {step: run.write(step) for step in (2, 4, 6)}
    named = str(folders[2])
    assert find_resume_point(run.folder, named) == folders[2]
    commit.archive_after(run.folder, 2)
    assert find_resume_point(run.folder, "auto") == folders[2]
    assert len(list(run.checkpoints.glob("superseded-0-step-*/COMPLETE"))) == 2
    run.resume = named
    again = run.write(4)
    assert find_resume_point(run.folder, named) == again, "the same command goes on, it does not go back once more"
    run.resume = "auto"
    run.write(6)
    commit.archive_after(run.folder, 4)
    assert len(list(run.checkpoints.glob("superseded-*/COMPLETE"))) == 3
