"""Watch what this process does to the machine: processes it starts, connections it makes, files it changes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STARTS = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.fork")
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.link", "os.symlink", "shutil.rmtree")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_seen: list[tuple[str, str]] | None = None


@contextmanager
def watched() -> Iterator[list[tuple[str, str]]]:
    """Collect ``(event, what)`` of all that the block does, ours and the interpreter's own (PEP 578)."""
    global _seen
    if not getattr(sys, "_afina_tests_watch", False):
        sys.addaudithook(_note)  # it can never be taken away again
        sys._afina_tests_watch = True  # type: ignore[attr-defined]
    _seen = []
    try:
        yield _seen
    finally:
        _seen = None


def harm(seen: list[tuple[str, str]], *allowed: Path) -> list[tuple[str, str]]:
    """Return what was started or connected to, and what was changed outside the folders that are allowed."""
    inside = tuple(str(folder.resolve()) for folder in allowed)
    return [
        (event, what)
        for event, what in seen
        if event in STARTS or event == "socket.connect" or not os.path.realpath(what).startswith(inside)
    ]


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if _seen is None:
        return
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
    if writes or event in (*STARTS, *CHANGES, "socket.connect"):
        _seen.append((event, str(arguments[0])))
