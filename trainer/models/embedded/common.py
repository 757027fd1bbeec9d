"""Check hashes and quiet transformers, for the builders of embedded models."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

from trainer.errors import ModelError
from trainer.files import sha256


def check_hash(path: Path, expected: str) -> None:
    """Verify a file's SHA-256.

    Raises:
        ModelError: it is another one than ``expected`` (hex digits).
    """
    found = sha256(path)
    if found != expected:
        raise ModelError(
            f"sha256 of {path.name}",
            value=found,
            reason=f"must be {expected}; the file is damaged or not the one that was published",
            hint="fetch again, from an index you trust",
        )


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence warnings and bars of transformers inside. Import what is needed before: no handler keeps our stream."""
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # The GGUF reader's own bar heeds no setting; it writes where sys.stderr points when it starts.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
