"""Digests of big files, remembered: a second start must not read gigabytes only to learn that nothing changed."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import DataError
from trainer.files import sha256, write_atomically

SETTLED_NS = 2_000_000_000
"""A younger time of change is not trusted: on some file systems a second write may leave the same time."""
MAX_FILES = 10_000

_Facts = list[int | str]


def hash_files(files: Sequence[Path], memory: Path | None = None) -> list[str]:
    """The SHA-256 of each file's bytes, as hex.

    Args:
        files: what to read.
        memory: a JSON file of earlier digests by path, size, time of change and inode; written anew when it can be,
            without harm to other processes that do the same. ``None`` reads every byte.

    Raises:
        DataError: a file cannot be read.
    """
    known = _recall(memory)
    found, fresh = [], {}
    for file in files:
        try:
            digest, facts = _digest(file, known.get(str(file)))
        except OSError as error:
            reason = f"cannot be read ({error.strerror or error})"
            raise DataError("data.path", value=file, reason=reason, hint="name a file that you may read") from error
        found.append(digest)
        if facts is not None and facts != known.get(str(file)):
            fresh[str(file)] = facts
    if memory is not None and fresh:
        _remember(memory, fresh)
    return found


def _digest(file: Path, known: _Facts | None) -> tuple[str, _Facts | None]:
    """The digest, and what may be remembered of it; ``None`` while the file is too young or is being written."""
    before = _state(file)
    settled = time.time_ns() - before[1] > SETTLED_NS
    if settled and known is not None and known[:-1] == before:
        return str(known[-1]), known
    digest = sha256(file)
    return digest, [*before, digest] if settled and _state(file) == before else None


def _state(file: Path) -> list[int]:
    """Size, time of change, inode; and the time of the inode's change, which a tool that sets the other back keeps."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns]


def _recall(memory: Path | None) -> dict[str, _Facts]:
    if memory is None:
        return {}
    try:
        tree = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(tree, dict):
        return {}
    return {name: facts for name, facts in tree.items() if _is_facts(facts)}


def _is_facts(facts: object) -> bool:
    if not isinstance(facts, list) or len(facts) != 5 or not all(type(number) is int for number in facts[:4]):
        return False
    return isinstance(facts[4], str) and len(facts[4]) == 64 and set(facts[4]) <= set("0123456789abcdef")


def _remember(memory: Path, fresh: dict[str, _Facts]) -> None:
    """Lay ``fresh`` over what others have written by now. A memory that cannot be written only costs time."""
    merged = {**{name: facts for name, facts in _recall(memory).items() if name not in fresh}, **fresh}
    kept = dict(list(merged.items())[-MAX_FILES:])
    with contextlib.suppress(OSError):
        write_atomically(memory, json.dumps(kept).encode())
