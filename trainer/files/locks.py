"""Lock between the processes of a machine, and say who owns a run."""

from __future__ import annotations

import contextlib
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.files.atomic import PARTIAL, new_file_mode
from trainer.files.parse import parse_json

if TYPE_CHECKING:
    from filelock import FileLock

OWNER_FILE = "owner.json"
"""In a run folder, who trains it; touched while they live, for hosts that do not see each other's locks."""
# An owner on another host that has not touched its file for so long is dead: clocks of a cluster differ by less.
SILENT_SECONDS = 120


@contextlib.contextmanager
def lock(path: Path, on_wait: Callable[[], object] | None = None) -> Iterator[None]:
    """Hold an exclusive lock between the processes of this machine; the kernel frees that of a killed process.

    Args:
        path: the lock file, which stays.
        on_wait: called once if another process holds the lock, before waiting for it.

    Raises:
        OSError: the lock file cannot be made.
    """
    file_lock = _file_lock(path)
    try:
        file_lock.acquire(blocking=on_wait is None)
    except TimeoutError:
        assert on_wait is not None
        on_wait()
        file_lock.acquire()
    try:
        yield
    finally:
        file_lock.release()


@contextlib.contextmanager
def try_lock(path: Path, patience_seconds: float = 0.0) -> Iterator[bool]:
    """Take the lock of :func:`lock` if nobody holds it for longer than that; yield whether it was taken."""
    file_lock = _file_lock(path)
    try:
        file_lock.acquire(timeout=patience_seconds)
    except TimeoutError:
        yield False
        return
    try:
        yield True
    finally:
        file_lock.release()


def remove_stale_partials(folder: Path) -> None:
    """Remove each ``NAME.partial`` in a folder whose ``NAME.lock`` no living process holds."""
    for partial in folder.glob(f"*{PARTIAL}"):
        with try_lock(folder / f"{partial.name.removesuffix(PARTIAL)}.lock") as held:
            if held:
                shutil.rmtree(partial, ignore_errors=True)


def run_lock_path(folder: Path) -> Path:
    """Return the lock of a run folder: beside it, because the folder itself may be moved aside."""
    return folder.with_name(f".{folder.name}.lock")


def find_owner(folder: Path) -> str | None:
    """Return, in words, the living process that trains into a run folder; ``None`` where there is none."""
    is_free = True
    if (path := run_lock_path(folder)).exists():
        with try_lock(path) as is_free:
            pass
    owner = read_owner(folder)
    return describe_owner(owner) if not is_free or is_alive_elsewhere(folder, owner) else None


def read_owner(folder: Path) -> dict[str, Any]:
    """Read who has shown itself as the owner of a run, dead or alive; empty where nobody has."""
    try:
        found = parse_json((folder / OWNER_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_alive_elsewhere(folder: Path, owner: Mapping[str, Any]) -> bool:
    """Return whether the owner of a run is of another host and has touched its file of late."""
    if not owner or owner.get("host") == socket.gethostname():
        return False
    try:
        return time.time() - (folder / OWNER_FILE).stat().st_mtime < SILENT_SECONDS
    except OSError:
        return False


def describe_owner(owner: Mapping[str, Any]) -> str:
    """Return an owner in words: process, host, Slurm job."""
    if not owner:
        return "another process, which has just begun"
    job = f", job {owner['job']}" if owner.get("job") else ""
    return f"process {owner.get('pid')} on {owner.get('host')}{job}, since {owner.get('since')}"


def _file_lock(path: Path) -> FileLock:
    from filelock import FileLock  # 30 ms that `afina config` and `--help` need not wait for

    # Older versions of filelock let only the file's maker lock it; a cache may be shared by a group.
    return FileLock(path, mode=new_file_mode())
