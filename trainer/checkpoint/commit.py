"""Checkpoint folders on disk, whatever they hold: named, sealed by a marker, found, verified, deleted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from trainer.files import sha256, sync

MARKER = "COMPLETE"


def checkpoint_dir(run: Path, step: int) -> Path:
    """Where a run's checkpoint of a step is, or would be."""
    return run / "checkpoints" / f"step-{step:08d}"


def commit(partial: Path, folder: Path) -> None:
    """Sync all of ``partial``, rename it to ``folder``, and last of all write the marker."""
    marker: dict[str, Any] = {}
    for file in sorted(f for f in partial.rglob("*") if f.is_file()):
        sync(file)
        marker[str(file.relative_to(partial))] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    temporary = folder / (MARKER + ".partial")
    temporary.write_text(json.dumps(marker, indent=1))
    sync(temporary)
    temporary.rename(folder / MARKER)
    sync(folder)
    sync(folder.parent)


def complete(checkpoints: Path) -> list[Path]:
    """Sealed folders, the newest last."""
    return sorted(f.parent for f in checkpoints.glob(f"step-*/{MARKER}") if not f.parent.name.endswith(".partial"))


def delete_old(checkpoints: Path, keep: int, best_step: int | None = None) -> None:
    """Delete all complete ones but the newest ``keep`` and that of ``best_step``."""
    for old in complete(checkpoints)[:-keep]:
        if best_step is not None and old == checkpoint_dir(checkpoints.parent, best_step):
            continue
        (old / MARKER).unlink()  # first, so that a half-deleted checkpoint is never taken for a complete one
        shutil.rmtree(old)


def find_corruption(folder: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; ``None`` when nothing is."""
    try:
        marker = json.loads((folder / MARKER).read_text())
        expected = [(folder / name, facts["bytes"], facts["sha256"]) for name, facts in marker.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{folder} has no readable {MARKER} marker"
    for file, size, digest in expected:
        if not file.exists():
            return f"{file} is missing"
        if file.stat().st_size != size or sha256(file) != digest:
            return f"{file} is not what was written (size or SHA-256 differ)"
    return None


def archive_after(run: Path, step: int) -> None:
    """Rename the run's checkpoints after ``step``: the run has gone back, so they are no longer its future.

    Left in place, they would be the newest, and the next start would go on from them.
    """
    for later in complete(run / "checkpoints"):
        if int(later.name.removeprefix("step-")) > step:
            number = 0
            while (aside := later.with_name(f"superseded-{number}-{later.name}")).exists():
                number += 1
            later.rename(aside)
