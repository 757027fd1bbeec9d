"""Remember the steps whose updates are left out, so that a run that goes on leaves out the same."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

from trainer.distributed.process_group import World, from_main
from trainer.errors import NotFiniteError
from trainer.files import parse_json

SKIPPED_FILE = "skipped.jsonl"
MAX_IN_A_ROW = 8  # more, and it is not the rows

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class SkippedSteps:
    """The steps that are left out, counted from 0 (updates taken before), alike on every rank.

    Attributes:
        file: where rank 0 writes them, a line each.
        is_main: whether this is rank 0.
        first: by a step that was not finite, the first of the steps that went with it: itself, or the one that the
            run was rewound to.
    """

    file: Path
    is_main: bool = True
    first: dict[int, int] = field(default_factory=dict)

    @staticmethod
    def read(run_dir: Path, world: World) -> SkippedSteps:
        """Read what earlier lives of the run have left out. A collective."""
        file = run_dir / SKIPPED_FILE
        first: dict[int, int] = {}
        if world.is_main and file.exists():
            for line in file.read_text().splitlines():
                try:
                    record = parse_json(line)
                    first[int(record["step"]) - 1] = int(record["first_step"]) - 1
                except (ValueError, KeyError, TypeError):
                    logger.warning(f"{file}: a line that cannot be read is left out")
        return SkippedSteps(file, world.is_main, from_main(first))

    def after(self, step: int) -> int:
        """Return the step that is up next at ``step``: behind those that a rewind has left out, if it is one."""
        while ends := [last for last, first in self.first.items() if first <= step < last]:
            step = max(ends)
        return step

    def add(self, first_step: int, step: int, error: NotFiniteError) -> None:
        """Leave out all from ``first_step`` to ``step``, which was not finite."""
        self.first[step] = first_step
        if not self.is_main:
            return
        record = {"step": step + 1, "first_step": first_step + 1, "reason": str(error)}
        with self.file.open("a") as out:
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
            out.flush()
            os.fsync(out.fileno())

    def is_stuck(self, step: int) -> bool:
        """Return whether the ``MAX_IN_A_ROW`` steps before this one were left out."""
        return all(step - k in self.first for k in range(1, MAX_IN_A_ROW + 1))

    def count(self, step: int) -> int:
        """Return how many of the first ``step`` steps are left out."""
        return sum(any(first <= k <= last for last, first in self.first.items()) for k in range(step))
