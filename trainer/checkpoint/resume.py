"""Find the checkpoint that a run resumes from."""

from __future__ import annotations

import json
from pathlib import Path

from trainer.checkpoint.commit import complete, find_corruption
from trainer.errors import CheckpointError


def find_resume_point(run_dir: Path, resume: str) -> Path | None:
    """Find the checkpoint to resume from: for ``auto`` the newest complete one of the run, or ``None``.

    Args:
        run_dir: the run folder.
        resume: ``checkpoint.resume``: auto, never or a checkpoint folder.

    Raises:
        CheckpointError: a named folder is not a complete checkpoint, or the newest one does not read as it was written.
    """
    if resume == "never":
        return None
    there = complete(run_dir / "checkpoints")
    # A run that went back to a named checkpoint and was then cut short resumes from what it has made since.
    if resume != "auto" and not (there and _resumed_by(there[-1]) == resume):
        verify(Path(resume), run_dir)
        return Path(resume)
    if not there:
        return None
    verify(there[-1], run_dir)
    return there[-1]


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
        return str(json.loads((folder / "state.json").read_text())["resume"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
