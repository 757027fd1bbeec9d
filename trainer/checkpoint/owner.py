"""One owner a run: a lock beside the run folder, taken before anything is written in it.

The lock is the kernel's, so it is free as soon as its holder is gone, however it went. Where a shared filesystem keeps
locks to one host, ``owner.json`` in the run folder tells of an owner elsewhere: it is touched while the owner lives.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.errors import LaunchError
from trainer.files import run_lock_path, try_lock, write_atomically

OWNER_FILE = "owner.json"
TOUCH_SECONDS = 20
# An owner on another host that has not touched its file for so long is dead: clocks of a cluster differ by less.
SILENT_SECONDS = 120

logger = logging.getLogger(__name__)


@contextmanager
def own_run(folder: Path) -> Iterator[None]:
    """Own a run inside the ``with`` block.

    Args:
        folder: the run folder; made if it is missing.

    Raises:
        LaunchError: another process owns it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with try_lock(run_lock_path(folder)) as is_free:
        before = _read(folder / OWNER_FILE)
        if not is_free or _is_alive_elsewhere(folder / OWNER_FILE, before):
            raise LaunchError(
                str(folder),
                reason=f"is being trained by {_describe(before)}",
                hint="wait for it, stop it, or give another run.name",
            )
        if before:
            logger.info(f"{folder}: its last owner, {_describe(before)}, was killed; this process takes over")
        yield


@contextmanager
def show_owner(folder: Path) -> Iterator[None]:
    """Show this process as the owner in the run folder inside the ``with`` block, for other hosts and for people."""
    file, done = folder / OWNER_FILE, threading.Event()
    owner = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(owner).encode() + b"\n")

    def touch() -> None:
        while not done.wait(TOUCH_SECONDS):
            try:
                os.utime(file)
            except OSError:
                return  # the folder is gone: whoever took it away knows

    threading.Thread(target=touch, name="owner", daemon=True).start()
    try:
        yield
    finally:
        done.set()
        file.unlink(missing_ok=True)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_alive_elsewhere(file: Path, owner: Mapping[str, Any]) -> bool:
    if not owner or owner.get("host") == socket.gethostname():
        return False
    try:
        return time.time() - file.stat().st_mtime < SILENT_SECONDS
    except OSError:
        return False


def _describe(owner: Mapping[str, Any]) -> str:
    if not owner:
        return "another process, which has just begun"
    job = f", job {owner['job']}" if owner.get("job") else ""
    return f"process {owner.get('pid')} on {owner.get('host')}{job}, since {owner.get('since')}"
