"""One owner a run: a lock beside the run folder, taken before anything is written in it.

The lock is the kernel's, so it is free as soon as its holder is gone, however it went. Where a shared filesystem keeps
locks to one host, ``owner.json`` in the run folder tells of an owner elsewhere: it is touched while the owner lives.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.errors import ConfigError, LaunchError
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
        ConfigError: the folder cannot be made.
        LaunchError: another process owns it.
    """
    _make_place(folder)
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


def _make_place(folder: Path) -> None:
    """Make the folder that run folders are in, and check that this one can be."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError("run.dir", value=folder.parent, reason="is a file", hint="another run.dir") from None
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise ConfigError("run.dir", value=folder.parent, reason=f"{error.strerror}", hint="another run.dir") from None
    if folder.exists() and not folder.is_dir():
        raise ConfigError("run.name", value=folder.name, reason=f"{folder} is a file", hint="another run.name")
    if (path := run_lock_path(folder)).is_symlink():
        reason = f"its lock {path} is a link, and a lock is a file of its own"
        raise ConfigError("run.name", value=folder.name, reason=reason, hint="remove it, or another run.name")
    if not os.access(folder.parent, os.W_OK):
        raise ConfigError("run.dir", value=folder.parent, reason="cannot be written", hint="another run.dir")


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
                if not done.is_set():
                    logger.warning(
                        f"{folder} was moved or deleted while the run goes on: checkpoints and the result are written "
                        f"into a new folder of that name, metrics.jsonl so far is not there"
                    )
                return

    threading.Thread(target=touch, name="owner", daemon=True).start()
    try:
        yield
    finally:
        done.set()
        file.unlink(missing_ok=True)
