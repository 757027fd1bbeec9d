"""Find the folder that a user means: by its path, or by the name of one in runs/."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from trainer.errors import CheckpointError
from trainer.tracking.files import CONFIG_FILE

RUNS = Path("runs")


def find_folder(what: str, typed: str, is_one: Callable[[Path], bool], reason: str, hint: str) -> Path:
    """Return the folder that was typed.

    Args:
        what: is wanted, for the error.
        typed: a path, or the name of a folder in ``runs/``.
        is_one: whether a folder is of the kind that is wanted.
        reason: why another one is none, for the error.
        hint: what to type, where no name in ``runs/`` is near.

    Raises:
        CheckpointError: there is none.
    """
    for folder in (Path(typed), RUNS / typed):
        if folder.is_dir() and is_one(folder):
            return folder
    names = [path.name for path in RUNS.glob("*") if path.is_dir() and is_one(path)]
    near = get_close_matches(Path(typed).name, names, n=1)
    raise CheckpointError(what, value=typed, reason=reason, hint=f"did you mean {RUNS / near[0]}?" if near else hint)


def find_run(typed: str) -> Path:
    """Return the folder of a run.

    Raises:
        CheckpointError: there is no such run.
    """
    reason = "is not a run folder (no config.yaml there)"
    hint = "give the folder that `afina train` wrote"
    return find_folder("run", typed, lambda folder: (folder / CONFIG_FILE).is_file(), reason, hint)
