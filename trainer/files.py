"""Files and folders on disk: sync, hash, atomic file, atomic folder with a marker, lock, owner of a run, cache root,
full disk.

The one place that writes beside, renames and marks. Loads no torch.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import CheckpointError

if TYPE_CHECKING:
    from filelock import FileLock

PARTIAL = ".partial"
"""Suffix of what is still being written. After a kill it stays, and the next writer removes it."""
OWNER_FILE = "owner.json"
"""In a run folder, who trains it; touched while they live, for hosts that do not see each other's locks."""
# An owner on another host that has not touched its file for so long is dead: clocks of a cluster differ by less.
SILENT_SECONDS = 120
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
# What filesystems answer that cannot sync a folder, or do not let it be opened.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM}


def cache_root() -> Path:
    """Return the folder of all that afina caches: `AFINA_CACHE`, else `$XDG_CACHE_HOME/afina`, else `~/.cache/afina`.

    A leading ``~`` is the home, a relative path is taken from the working directory.
    """
    if own := os.environ.get("AFINA_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "afina"


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk.

    Raises:
        OSError: it cannot, or nothing is there.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder, where the filesystem can: without it a rename may be lost with the power."""
    try:
        sync(folder)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's bytes, as hex digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def new_file_mode() -> int:
    """Return the permission bits that ``open`` gives new files here (0o666 less the umask)."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a kill, meets the old content or the new one and nothing between.

    Missing folders above it are made.

    Raises:
        OSError: it could not be written; the old content is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def partial_path(folder: Path) -> Path:
    """Return where a folder is filled before it has its name: ``NAME.partial`` beside it."""
    return folder.with_name(folder.name + PARTIAL)


@contextlib.contextmanager
def partial_folder(folder: Path) -> Iterator[Path]:
    """Make an empty ``NAME.partial`` beside ``folder`` to be filled and committed; at the end it is gone either way.

    What a killed process left there is removed first, so only one process may do this at a time: hold a lock.
    """
    partial = partial_path(folder)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def commit_folder(partial: Path, folder: Path, marker: str | None = None, content: str = "") -> None:
    """Publish a filled folder: sync its files, rename it to ``folder``, and last of all write its marker.

    Args:
        partial: the filled folder, on the same filesystem as ``folder``.
        folder: its name from now on. With a marker, what is there is replaced; without one it must not be there.
        marker: name of the file that says that the folder is complete; ``None`` writes none.
        content: the marker's text.

    Raises:
        OSError: a step failed. There is no marker then, so ``folder`` does not count as complete.
    """
    for file in _files(partial):
        sync(file)
    if marker is not None:
        (folder / marker).unlink(missing_ok=True)  # first: what is half deleted must not count as complete
        shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    if marker is not None:
        write_atomically(folder / marker, content.encode())
    sync_folder(folder.parent)


def file_manifest(folder: Path, known: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Return ``{relative path: {"bytes": size, "sha256": hex digits}}`` of every file in a folder, sorted by path.

    Args:
        folder: the folder.
        known: entries of files that need not be read again.
    """
    found = {str(file.relative_to(folder)): file for file in _files(folder)}
    return {
        name: (known or {}).get(name) or {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for name, file in found.items()
    }


def find_damage(folder: Path, manifest: Mapping[str, Any], *, hashes: bool = True) -> str | None:
    """Compare a folder with its :func:`file_manifest`; return what is wrong, naming the file, or ``None``.

    Args:
        folder: the folder.
        manifest: what was written; files that it does not name are not looked at.
        hashes: read every byte; otherwise only the sizes count.

    Raises:
        KeyError, TypeError, AttributeError: ``manifest`` is not one.
    """
    expected = [(folder / name, entry["bytes"], entry["sha256"]) for name, entry in manifest.items()]
    for file, size, digest in expected:
        try:
            same = file.stat().st_size == size and (not hashes or sha256(file) == digest)
        except FileNotFoundError:
            return f"{file} is missing"
        except OSError as error:
            return f"{file} cannot be read ({error.strerror})"
        if not same:
            return f"{file} is not what was written (size or SHA-256 differ)"
    return None


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
        found = json.loads((folder / OWNER_FILE).read_text())
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


def remove_stale_partials(folder: Path) -> None:
    """Remove each ``NAME.partial`` in a folder whose ``NAME.lock`` no living process holds."""
    for partial in folder.glob(f"*{PARTIAL}"):
        with try_lock(folder / f"{partial.name.removesuffix(PARTIAL)}.lock") as held:
            if held:
                shutil.rmtree(partial, ignore_errors=True)


def explain_full_disk(error: BaseException) -> CheckpointError | None:
    """Return the error to show for a disk that takes no more; ``None`` for any other error.

    Python raises an ``OSError`` then, safetensors and tokenizers classes of their own that quote its number.
    """
    quoted = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(quoted[1]) if quoted else None
    if number not in FULL:
        return None
    file = error.filename if isinstance(error, OSError) else None
    reason = f"the disk takes no more: {os.strerror(number)}"
    return CheckpointError(str(file or "writing"), reason=reason, hint="make room, then the same command again")


def _file_lock(path: Path) -> FileLock:
    from filelock import FileLock  # 30 ms that `afina config` and `--help` need not wait for

    # Older versions of filelock let only the file's maker lock it; a cache may be shared by a group.
    return FileLock(path, mode=new_file_mode())


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())
