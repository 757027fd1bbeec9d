"""Leave trials of a group behind at the rungs of successive halving, by the rules of ``tracking.halving``.

Every decision is a function of metrics.jsonl, so a group that was killed decides as one that was not.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.distributed.process_group import World, from_main
from trainer.together.group import HalvingSettings
from trainer.together.trial import Trial
from trainer.tracking.files import find_summary
from trainer.tracking.halving import decide, score_until

logger = logging.getLogger(__name__)


class Rungs:
    """The rungs of a group.

    Args:
        settings: of the sweep.
        folders: the run folders of all trials, in the sweep's order.
        world: this process; metrics.jsonl is read on rank 0.

    Attributes:
        step: updates at the next rung; infinite where no choice is left.
    """

    def __init__(self, settings: HalvingSettings, folders: Sequence[Path], world: World) -> None:
        self.step: float = settings.min_steps
        self._settings, self._world = settings, world
        self._alive = list(folders)

    def replay(self, saved: Mapping[str, int], running: Sequence[Path]) -> list[Path]:
        """Make the choices again that an earlier life of the group has made: those of rungs that it has saved beyond.

        Args:
            saved: the step that each trial had saved at the group's last common moment: of those that were trained.
            running: the folders of trials that have not ended.

        Returns:
            Those of ``running`` that were left behind.
        """
        reached = min(saved.values(), default=0)
        while self.step < reached:
            failed = from_main(self._failed() if self._world.is_main else [])
            self._alive = [folder for folder in self._alive if folder not in failed]
            self._choose(running)
        return [folder for folder in running if folder not in self._alive]

    def decide(self, trials: Sequence[Trial]) -> list[Trial]:
        """Return the trials that are left behind now: none before all have reached the rung. A collective.

        Args:
            trials: that are still trained, after their step's evaluation.
        """
        if not trials or any(trial.steps < self.step for trial in trials):
            return []
        self._choose([trial.job.run.folder for trial in trials])
        return [trial for trial in trials if trial.job.run.folder not in self._alive]

    def failed(self, trial: Trial) -> None:
        """Judge a trial no more."""
        self._alive = [folder for folder in self._alive if folder != trial.job.run.folder]

    def _failed(self) -> list[Path]:
        """Return the trials that had failed before this rung."""
        summaries = {folder: find_summary(folder) for folder in self._alive}
        return [f for f, found in summaries.items() if found.get("status") == "failed" and found["steps"] < self.step]

    def _choose(self, running: Sequence[Path]) -> None:
        """Choose at this rung, by what the run folders hold up to its step, and go on to the next one."""
        settings = self._settings
        if len(self._alive) <= 1 or not any(folder in self._alive for folder in running):
            self.step = math.inf
            return
        kept: list[int] = []
        if self._world.is_main:
            scores = [score_until(folder, int(self.step), settings.metric) for folder in self._alive]
            kept = decide(scores, settings.reduction_factor, settings.lower_is_better)
        kept = from_main(kept)
        names = ", ".join(self._alive[place].name for place in kept)
        logger.info(f"step {int(self.step)}: of {len(self._alive)} trials {len(kept)} go on: {names}")
        self._alive = [self._alive[place] for place in kept]
        self.step *= settings.reduction_factor
