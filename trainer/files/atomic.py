"""Write files and folders so that a reader, or a kill, meets the old or the new one; the cache root; a full disk."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from trainer.errors import CheckpointError

logger = logging.getLogger(__name__)

PARTIAL = ".partial"
"""Suffix of what is still being written. After a kill it stays, and the next writer removes it."""
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
    for file in files_below(partial):
        sync(file)
    if marker is not None:
        (folder / marker).unlink(missing_ok=True)  # first: what is half deleted must not count as complete
        shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    if marker is not None:
        write_atomically(folder / marker, content.encode())
    sync_folder(folder.parent)


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


def files_below(folder: Path) -> list[Path]:
    """Return every file in a folder and below it, sorted."""
    return sorted(file for file in folder.rglob("*") if file.is_file())


@cache
def warn_if_others_may_write(folder: Path) -> None:
    """Say once where somebody else than this user, or root, may change what is in a folder that is read again."""
    with contextlib.suppress(OSError):
        status = folder.stat()
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & stat.S_IWOTH:
            logger.warning(f"{folder} can be written by others, and is read as they leave it (AFINA_CACHE=FOLDER)")
