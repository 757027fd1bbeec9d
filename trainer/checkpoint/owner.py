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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.errors import LaunchError
from trainer.files import (
    OWNER_FILE,
    describe_owner,
    is_alive_elsewhere,
    read_owner,
    run_lock_path,
    try_lock,
    write_atomically,
)

TOUCH_SECONDS = 20
# Who looks whether a run has an owner holds its lock for an instant (``trainer.files.find_owner``).
PATIENCE_SECONDS = 0.3

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
    with try_lock(run_lock_path(folder), PATIENCE_SECONDS) as is_free:
        before = read_owner(folder)
        if not is_free or is_alive_elsewhere(folder, before):
            raise LaunchError(
                str(folder),
                reason=f"is being trained by {describe_owner(before)}",
                hint="wait for it, stop it, or give another run.name",
            )
        if before:
            logger.info(f"{folder}: its last owner, {describe_owner(before)}, was killed; this process takes over")
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
