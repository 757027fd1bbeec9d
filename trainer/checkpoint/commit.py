"""Name, commit, find, verify and delete checkpoint folders, whatever they hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.files import PARTIAL, commit_folder, file_manifest, find_damage, parse_json

MARKER = "COMPLETE"


def checkpoint_dir(run: Path, step: int) -> Path:
    """Return where a run's checkpoint of a step is, or would be."""
    return run / "checkpoints" / f"step-{step:08d}"


def commit(partial: Path, folder: Path, hashed: Mapping[str, Any] | None = None) -> None:
    """Publish a written checkpoint: sync ``partial``, rename it to ``folder``, and last of all write the marker.

    Args:
        partial: the written folder.
        folder: its name from now on.
        hashed: manifest entries of the files that other ranks have hashed already.
    """
    manifest = file_manifest(partial, known=hashed or {})
    commit_folder(partial, folder, MARKER, json.dumps(manifest, indent=1))


def complete(checkpoints: Path) -> list[Path]:
    """Return the checkpoints that have their marker, the newest last."""
    return sorted(f.parent for f in checkpoints.glob(f"step-*/{MARKER}") if f.parent.suffix != PARTIAL)


def delete_old(checkpoints: Path, keep: int, best_step: int | None = None) -> None:
    """Delete all complete checkpoints but the newest ``keep`` and that of ``best_step``."""
    for old in complete(checkpoints)[:-keep]:
        if best_step is not None and old == checkpoint_dir(checkpoints.parent, best_step):
            continue
        (old / MARKER).unlink()  # first, so that a half-deleted checkpoint is never taken for a complete one
        shutil.rmtree(old)


def find_corruption(folder: Path) -> str | None:
    """Verify a checkpoint's files against its marker; return what is wrong, naming the file, or ``None``."""
    try:
        return find_damage(folder, parse_json((folder / MARKER).read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{folder} has no readable {MARKER} marker"


def archive_after(run: Path, step: int) -> None:
    """Rename the run's checkpoints after ``step``, which the run is resumed from and so no longer leads to.

    Left in place, they would be the newest, and the next start would resume from them.
    """
    for later in complete(run / "checkpoints"):
        if int(later.name.removeprefix("step-")) > step:
            set_aside(later, "superseded")


def set_aside(folder: Path, why: str) -> Path:
    """Rename a checkpoint to ``WHY-N-NAME`` beside it, so that it is neither found nor lost; return the new path."""
    number = 0
    while (aside := folder.with_name(f"{why}-{number}-{folder.name}")).exists():
        number += 1
    folder.rename(aside)
    return aside
