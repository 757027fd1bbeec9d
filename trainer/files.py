"""Files as the disk has them, and a disk that takes no more."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from pathlib import Path

from trainer.errors import CheckpointError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Not every filesystem can do it for folders.

    Raises:
        OSError: it cannot, or nothing is there.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def explain_full_disk(error: BaseException) -> CheckpointError | None:
    """What to tell of a disk that takes no more; ``None`` for any other error.

    Python says it with an ``OSError``, safetensors and tokenizers with classes of their own that quote its number.
    """
    quoted = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(quoted[1]) if quoted else None
    if number not in FULL:
        return None
    file = error.filename if isinstance(error, OSError) else None
    reason = f"the disk takes no more: {os.strerror(number)}"
    return CheckpointError(str(file or "writing"), reason=reason, hint="make room, then the same command again")


def sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, as hex digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
