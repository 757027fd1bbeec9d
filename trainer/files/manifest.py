"""Say what a folder's files hold, and whether they still do."""

from __future__ import annotations

import contextlib
import hashlib
import json
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.files.atomic import files_below, write_atomically

# Two changes within a tick of a filesystem's clock have the same time: what has just changed is compared once more.
TIMES_ARE_COARSE_SECONDS = 2.0


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's bytes, as hex digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_manifest(folder: Path, known: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Return ``{relative path: {"bytes": size, "sha256": hex digits}}`` of every file in a folder, sorted by path.

    Args:
        folder: the folder.
        known: entries of files that need not be read again.
    """
    found = {str(file.relative_to(folder)): file for file in files_below(folder)}
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
        if ".." in file.parts or not file.is_relative_to(folder):
            return f"{folder} names a file outside of it"
        try:
            is_file = stat.S_ISREG((status := file.stat()).st_mode)  # a pipe or /dev/zero would be read for ever
            same = is_file and status.st_size == size and (not hashes or sha256(file) == digest)
        except FileNotFoundError:
            return f"{file} is missing"
        except OSError as error:
            return f"{file} cannot be read ({error.strerror})"
        if not same:
            return f"{file} is not what was written (size or SHA-256 differ)"
    return None


def find_change(folder: Path, manifest: Mapping[str, Any], memo: Path) -> str | None:
    """Compare a folder with its manifest, every byte, where its files are not those that were compared before.

    Reading 270 MB at each start is too much; a file that was written since has another time of change, which only the
    kernel sets.

    Args:
        folder: the folder.
        manifest: of :func:`file_manifest`.
        memo: where it is kept what was compared; it need not be there.

    Returns:
        What is wrong, naming the file, or ``None``.

    Raises:
        KeyError, TypeError, AttributeError: ``manifest`` is not one.
        OSError: a file is missing.
    """
    seen, newest = _signature(folder, manifest)
    try:
        if memo.read_text() == seen:
            return None
    except (OSError, ValueError):
        pass
    damage = find_damage(folder, manifest)
    if damage is None and time.time() - newest > TIMES_ARE_COARSE_SECONDS:
        with contextlib.suppress(OSError):  # a cache of somebody else's: it is compared again the next time
            write_atomically(memo, seen.encode())
    return damage


def _signature(folder: Path, manifest: Mapping[str, Any]) -> tuple[str, float]:
    """Return what changes when a file or the manifest does (hash, size, inode and the kernel's time of each change),
    and the newest of those times, in seconds."""
    stats = {name: (folder / name).stat() for name in sorted(manifest)}
    parts = [
        [name, manifest[name]["sha256"], found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]
        for name, found in stats.items()
    ]
    return json.dumps(parts), max((found.st_ctime for found in stats.values()), default=0.0)
