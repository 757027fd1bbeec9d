"""Files, folders and locks: whole or not there, whichever process is killed at whichever call."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.logged import logged_lines
from tests.helpers.processes import ROOT
from trainer.data.prepare.prepare import default_cache
from trainer.files import atomic as files
from trainer.files import (
    cache_root,
    commit_folder,
    explain_full_disk,
    file_manifest,
    find_change,
    find_damage,
    lock,
    partial_folder,
    partial_path,
    remove_stale_partials,
    sha256,
    try_lock,
    warn_if_others_may_write,
    write_atomically,
)
from trainer.files import manifest as files_manifest


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def test_one_cache_for_models_and_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for value, root in (
        (str(tmp_path / "own"), tmp_path / "own"),
        ("~/c", tmp_path / "home" / "c"),
        ("here", tmp_path / "here"),
    ):
        monkeypatch.setenv("AFINA_CACHE", value)
        assert (cache_root(), default_cache()) == (root, root / "data")
    monkeypatch.delenv("AFINA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert (cache_root(), default_cache()) == (tmp_path / "xdg" / "afina", tmp_path / "xdg" / "afina" / "data")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == tmp_path / "home" / ".cache" / "afina"


@pytest.mark.parametrize("killed_in", ["open", "fsync", "replace"])
def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: str) -> None:
    path = tmp_path / "folder" / "file"
    write_atomically(path, b"old")
    assert path.stat().st_mode & 0o777 == files.new_file_mode()

    def killed(*_: Any, **__: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(*(("builtins.open", killed) if killed_in == "open" else (os, killed_in, killed)))
        with pytest.raises(Killed):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == ["file"]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def fill(folder: Path, text: str = "content") -> None:
    (folder / "below").mkdir(parents=True)
    (folder / "a").write_text(text)
    (folder / "below" / "b").write_text(text)


def test_a_committed_folder_is_whole_and_replaces_the_one_before(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    for text in ("first", "second"):
        with partial_folder(folder) as partial:
            assert partial == partial_path(folder) == tmp_path / "deep" / "folder.partial"
            fill(partial, text)
            (partial / text).touch()
            commit_folder(partial, folder, "DONE", json.dumps(file_manifest(partial)))
        assert os.listdir(tmp_path / "deep") == ["folder"]
        assert sorted(os.listdir(folder)) == sorted(["DONE", "a", "below", text])
        manifest = json.loads((folder / "DONE").read_text())
        assert list(manifest) == sorted(["a", "below/b", text])
        assert manifest["below/b"] == {"bytes": len(text), "sha256": sha256(folder / "below" / "b")}
        assert find_damage(folder, manifest) is None


def test_without_a_marker_nothing_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    fill(folder, "of the user")
    with partial_folder(folder) as partial:
        fill(partial)
        with pytest.raises(OSError, match="not empty"):
            commit_folder(partial, folder)
    assert (folder / "a").read_text() == "of the user"
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("name", ["sync", "write_atomically", "sync_folder", "rename", "rmtree"])
def test_a_folder_that_was_not_committed_has_no_marker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """At every call of every step, over a complete folder of before."""
    folder = tmp_path / "folder"
    owner: Any = {"rename": Path, "rmtree": files.shutil}.get(name, files)
    original, survived = getattr(owner, name), 0
    while True:
        fill(folder, "old")
        (folder / "DONE").write_text("old")
        left = iter(range(survived))

        def killed(*args: Any, left: Any = left, **keys: Any) -> Any:
            if next(left, None) is None:
                raise Killed
            return original(*args, **keys)

        partial = partial_path(folder)
        fill(partial, "new")
        try:
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, killed)
                commit_folder(partial, folder, "DONE", "new")
        except Killed:
            survived += 1
        else:
            break
        if (folder / "DONE").exists():
            held = (folder / "DONE").read_text()
            assert (folder / "a").read_text() == (folder / "below" / "b").read_text() == held
        for path in (folder, partial):
            original_rmtree(path, ignore_errors=True)
    assert survived >= 1


original_rmtree = files.shutil.rmtree


@pytest.mark.parametrize(
    ("damage", "hashes", "found"),
    [
        (lambda f: f.unlink(), False, "is missing"),
        (lambda f: f.write_text("contenT"), True, "is not what was written"),
        (lambda f: f.write_text("contenT"), False, None),
        (lambda f: f.write_text("conten"), False, "is not what was written"),
        (lambda f: (f.unlink(), f.symlink_to(f)), False, "cannot be read"),
    ],
    ids=["missing", "other byte", "other byte, sizes only", "shorter", "unreadable"],
)
def test_damage_is_named(tmp_path: Path, damage: Any, hashes: bool, found: str | None) -> None:
    fill(tmp_path / "f")
    manifest = file_manifest(tmp_path / "f")
    damage(tmp_path / "f" / "below" / "b")
    said = find_damage(tmp_path / "f", manifest, hashes=hashes)
    assert said == found or (said is not None and f"{tmp_path}/f/below/b {found}" in said)


HOLD = """
import sys, time
from pathlib import Path
from trainer.files import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_is_exclusive_and_that_of_a_killed_process_is_free(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with try_lock(path) as held:
            assert not held
        waited: list[float] = []

        def on_wait() -> None:
            waited.append(time.monotonic())
            holder.kill()

        with lock(path, on_wait):
            assert len(waited) == 1
            with try_lock(path) as held:
                assert not held, "by this process itself"
    finally:
        holder.kill()
        holder.communicate()
    with lock(path, on_wait=lambda: pytest.fail("nobody holds it")), try_lock(tmp_path / "b.lock") as held:
        assert held


def test_partials_of_the_dead_are_removed_and_those_of_the_living_stay(tmp_path: Path) -> None:
    for name in ("living", "dead"):
        fill(tmp_path / f"{name}.partial")
    with lock(tmp_path / "living.lock"):
        remove_stale_partials(tmp_path)
    assert sorted(f.name for f in tmp_path.glob("*.partial")) == ["living.partial"]


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.EINVAL])
def test_a_filesystem_that_cannot_sync_folders_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fsync = os.fsync

    def refused(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refused)
    fill(tmp_path / "folder.partial")
    commit_folder(tmp_path / "folder.partial", tmp_path / "folder", "DONE", "{}")
    assert (tmp_path / "folder" / "DONE").exists()


def test_a_disk_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", failed)
    with pytest.raises(OSError, match="Input/output"):
        files.sync_folder(tmp_path)


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/runs/x"), "/runs/x"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "writing"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "writing"),
        (OSError(errno.EACCES, "Permission denied"), None),
        (ValueError("28"), None),
    ],
)
def test_a_full_disk_is_one_line(error: BaseException, named: str | None) -> None:
    told = explain_full_disk(error)
    assert (told is None) == (named is None)
    assert named is None or (named in str(told) and "the disk takes no more" in str(told))


def test_a_file_is_read_again_once_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, memo = tmp_path / "model", tmp_path / ".compared"
    folder.mkdir()
    (folder / "weights").write_bytes(b"good" * 1000)
    manifest = file_manifest(folder)
    read: list[Path] = []
    monkeypatch.setattr(files_manifest, "sha256", lambda file: read.append(file) or sha256(file))
    assert find_change(folder, manifest, memo) is None
    assert not memo.exists(), "it has just been written, and may be within the same tick"
    monkeypatch.setattr(files_manifest, "TIMES_ARE_COARSE_SECONDS", 0.02)
    time.sleep(0.03)
    read.clear()
    assert find_change(folder, manifest, memo) is None
    assert find_change(folder, manifest, memo) is None
    assert len(read) == 1
    times = (folder / "weights").stat()
    (folder / "weights").write_bytes(b"evil" * 1000)  # of the same size
    os.utime(folder / "weights", ns=(times.st_atime_ns, times.st_mtime_ns))  # and, it seems, as old
    assert (
        find_change(folder, manifest, memo) == f"{folder / 'weights'} is not what was written (size or SHA-256 differ)"
    )


def test_a_cache_that_others_can_write_is_told(tmp_path: Path) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with logged_lines() as said:
        for folder in (tmp_path, tmp_path / "missing", open_to_all, open_to_all):
            warn_if_others_may_write(folder)
    assert len(said) == 1
    assert "can be written by others" in said[0]
