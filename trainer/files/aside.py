"""Move a run's folder aside: nothing is deleted that was paid for."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import ConfigError


def move_aside(folder: Path, marks: Sequence[str]) -> Path:
    """Rename a run's folder by the time; return its new path.

    Args:
        folder: that a new run takes the place of.
        marks: files of which a run has at least one.

    Raises:
        ConfigError: no run has made it.
    """
    if any(folder.iterdir()) and not any((folder / name).exists() for name in marks):
        reason = f"{folder} is no run: it is left where it is"
        raise ConfigError("run.overwrite", value="true", reason=reason, hint="another run.name or run.dir")
    aside = folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")
    numbered = (aside.with_name(f"{aside.name}-{n}") for n in itertools.count(2))
    free = next(candidate for candidate in itertools.chain([aside], numbered) if not candidate.exists())
    folder.rename(free)  # two may be moved aside within one second
    return free
