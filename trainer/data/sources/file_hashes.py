"""Hash big files, and cache the hashes: a second start must not read gigabytes only to find that nothing changed."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import DataError
from trainer.files import sha256, write_atomically

SETTLED_NS = 2_000_000_000
"""A younger modification time is not trusted: on some file systems a second write may leave the same time."""
MAX_FILES = 10_000

_Entry = list[int | str]


def hash_files(files: Sequence[Path], known_hashes: Path | None = None) -> list[str]:
    """Return the SHA-256 of each file's bytes, as hex.

    Args:
        files: what to read.
        known_hashes: a JSON file of earlier hashes by path, size, modification time and inode; updated when it can be,
            without harm to other processes that do the same. ``None`` reads every byte.

    Raises:
        DataError: a file cannot be read.
    """
    known = _load_known(known_hashes)
    found, fresh = [], {}
    for file in files:
        try:
            digest, entry = _hash_file(file, known.get(str(file)))
        except OSError as error:
            reason = f"cannot be read ({error.strerror or error})"
            raise DataError("data.path", value=file, reason=reason, hint="name a file that you may read") from error
        found.append(digest)
        if entry is not None and entry != known.get(str(file)):
            fresh[str(file)] = entry
    if known_hashes is not None and fresh:
        _save_known(known_hashes, fresh)
    return found


def _hash_file(file: Path, known: _Entry | None) -> tuple[str, _Entry | None]:
    """Return the hash, and the entry to keep of it; ``None`` while the file is too young or is being written."""
    before = _file_state(file)
    settled = time.time_ns() - before[1] > SETTLED_NS
    if settled and known is not None and known[:-1] == before:
        return str(known[-1]), known
    digest = sha256(file)
    return digest, [*before, digest] if settled and _file_state(file) == before else None


def _file_state(file: Path) -> list[int]:
    """Return size, modification time, inode, and the inode's change time, which no tool sets back."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns]


def _load_known(known_hashes: Path | None) -> dict[str, _Entry]:
    if known_hashes is None:
        return {}
    try:
        tree = json.loads(known_hashes.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(tree, dict):
        return {}
    return {name: entry for name, entry in tree.items() if _is_entry(entry)}


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, list) or len(entry) != 5 or not all(type(number) is int for number in entry[:4]):
        return False
    return isinstance(entry[4], str) and len(entry[4]) == 64 and set(entry[4]) <= set("0123456789abcdef")


def _save_known(known_hashes: Path, fresh: dict[str, _Entry]) -> None:
    """Add ``fresh`` to what other processes have saved by now. A file that cannot be written only costs time."""
    merged = {**{name: entry for name, entry in _load_known(known_hashes).items() if name not in fresh}, **fresh}
    kept = dict(list(merged.items())[-MAX_FILES:])
    with contextlib.suppress(OSError):
        write_atomically(known_hashes, json.dumps(kept).encode())
