"""Remember at which steps all trials of a group have saved, so that a killed group goes on from one moment.

Each trial's checkpoints are its own, and complete by themselves. What is computed together depends to the last bit on
who is in the batch, so a group resumes from steps that belong together: those of the file that is written after the
last trial has saved. For the same reason it holds the scores of these steps once they are there: a trial that ends with
them is not in the batch when they are asked for again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trainer.checkpoint.commit import MARKER, checkpoint_dir, find_corruption
from trainer.files import parse_json, write_atomically

SAVES_FILE = "saved.json"


@dataclass(frozen=True, slots=True)
class Saves:
    """The last moment at which all trials of a group had saved.

    Attributes:
        steps: that each has saved, by the name of its run folder; empty where there was no such moment.
        scores: of the evaluations of these steps, as far as they were made.
    """

    steps: Mapping[str, int] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def write_saves(folder: Path, saves: Saves) -> None:
    """Write a common moment, in the place of the one before; on rank 0."""
    content = {"steps": dict(saves.steps), "scores": {name: dict(found) for name, found in saves.scores.items()}}
    write_atomically(folder / SAVES_FILE, json.dumps(content, indent=1).encode() + b"\n")


def read_saves(folder: Path) -> Saves:
    """Read the last common moment."""
    try:
        found = parse_json((folder / SAVES_FILE).read_text())
        steps = {str(name): int(step) for name, step in found["steps"].items()}
        scores = {
            str(name): {str(metric): float(value) for metric, value in own.items()}
            for name, own in found["scores"].items()
        }
        return Saves(steps, scores)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Saves()


def common_resume_point(run_dir: Path, newest: Path | None, saves: Saves) -> Path | None:
    """Return the checkpoint that a trial resumes from: of the common moment, where it is there and good.

    Args:
        run_dir: the trial's run folder.
        newest: what it would resume from alone.
        saves: by :func:`read_saves`.
    """
    step = saves.steps.get(run_dir.name)
    if newest is None or step is None:
        return newest
    folder = checkpoint_dir(run_dir, step)
    is_there = (folder / MARKER).is_file() and folder.name <= newest.name and folder.parent == newest.parent
    return folder if is_there and find_corruption(folder) is None else newest
