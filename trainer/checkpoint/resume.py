"""Find the checkpoint that a run resumes from."""

from __future__ import annotations

import logging
from pathlib import Path

from trainer.checkpoint.commit import complete, find_corruption, set_aside
from trainer.errors import CheckpointError
from trainer.files import parse_json

logger = logging.getLogger(__name__)


def find_resume_point(run_dir: Path, resume: str) -> Path | None:
    """Find the checkpoint to resume from: for ``auto`` the newest of the run that is good, or ``None``.

    Args:
        run_dir: the run folder.
        resume: ``checkpoint.resume``: auto, strict, never or a checkpoint folder. With ``auto`` a newer one that does
            not read as it was written is named and set aside.

    Raises:
        CheckpointError: a named folder is not a complete checkpoint; none of the run's is good; or, with ``strict``,
            the newest one is not.
    """
    if resume == "never":
        return None
    there = complete(run_dir / "checkpoints")
    # A run that went back to a named checkpoint and was then cut short resumes from what it has made since.
    if resume not in ("auto", "strict") and not (there and _resumed_by(there[-1]) == resume):
        verify(Path(resume), run_dir)
        return Path(resume)
    if not there:
        return None
    if resume == "strict":
        verify(there[-1], run_dir)
        return there[-1]
    return _newest_good(there, run_dir)


def _newest_good(there: list[Path], run_dir: Path) -> Path:
    """Set newer ones that are corrupt aside; where all are, nothing is touched."""
    corruptions: list[tuple[Path, str]] = []
    for folder in reversed(there):
        corruption = find_corruption(folder)
        if corruption is None:
            for corrupt, reason in corruptions:
                aside = set_aside(corrupt, "corrupt")
                logger.warning(f"{reason}; that checkpoint is set aside as {aside.name}")
            if corruptions:
                logger.warning(f"resuming from {folder.name}, the newest good one (checkpoint.resume=strict: an error)")
            return folder
        corruptions.append((folder, corruption))
    verify(there[-1], run_dir)
    raise AssertionError("it was corrupt")


def verify(folder: Path, run_dir: Path) -> None:
    """Compare a checkpoint's files with the sizes and hashes in its marker.

    Raises:
        CheckpointError: names the file, and the newest other checkpoint that is good.
    """
    corruption = find_corruption(folder)
    if corruption is None:
        return
    others = [c for c in complete(run_dir / "checkpoints") if c != folder and find_corruption(c) is None]
    hint = f"checkpoint.resume={others[-1]}" if others else "checkpoint.resume=never run.overwrite=true starts afresh"
    raise CheckpointError(corruption, reason="so the checkpoint cannot be used", hint=hint)


def _resumed_by(folder: Path) -> str | None:
    """Read ``checkpoint.resume`` of the run that wrote a checkpoint; ``None`` when it cannot be read."""
    try:
        return str(parse_json((folder / "state.json").read_text())["resume"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
