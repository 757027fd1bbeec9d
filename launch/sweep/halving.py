"""Stop trials early by successive halving (the rungs of ASHA; Li et al., 2020): the best part of a rung goes on.

Each rung is complete before it is decided, by what the run folders hold up to its step: a sweep that was interrupted
decides as one that was not.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from launch.sweep.space import Space
from launch.trials import Trial, is_finished
from trainer.tracking.files import find_summary
from trainer.tracking.halving import decide, score_until

logger = logging.getLogger(__name__)


class Halving:
    """Decides which trials go on. ``next_round`` gives those to be trained, each until its next rung.

    Args:
        space: with `sweep.min_steps`, `sweep.reduction_factor` and the metric.
        trials: of the sweep.
    """

    def __init__(self, space: Space, trials: Sequence[Trial]) -> None:
        settings = space.config.sweep
        assert settings.min_steps is not None, "checked with the config"
        self.notes: dict[str, str] = {}
        self._space = space
        self._factor = settings.reduction_factor
        self._alive = list(trials)
        self._step = settings.min_steps
        self._rung = 0

    @property
    def alive(self) -> list[Trial]:
        """Return the trials that are judged at the next rung."""
        return self._alive

    @property
    def step(self) -> int:
        """Return the updates before the next rung."""
        return self._step

    def rules(self) -> dict[str, Any]:
        """Return how a process that trains all of :attr:`alive` together goes on from the next rung by itself."""
        return {
            "min_steps": self._step,
            "reduction_factor": self._factor,
            "metric": self._space.metric,
            "lower_is_better": self._space.lower_is_better,
        }

    def next_round(self) -> list[Trial]:
        """Return the trials to train, until the step of the next rung; the last one to its end; none: all is done."""
        unfinished = [trial for trial in self._alive if not is_finished(trial)]
        last = len(self._alive) == 1
        return [trial.until(None if last else self._step) for trial in unfinished]

    def decide(self, failed: AbstractSet[str]) -> None:
        """Let the best part go on from this rung, and say of the others where they were stopped."""
        self._alive = [trial for trial in self._alive if trial.name not in failed]
        if len(self._alive) <= 1 or all(map(is_finished, self._alive)):
            self._alive = [trial for trial in self._alive if not is_finished(trial)]
            return
        scores = [score_until(trial.folder, self._step, self._space.metric) for trial in self._alive]
        kept = decide(scores, self._factor, self._space.lower_is_better)
        for place, trial in enumerate(self._alive):
            if place not in kept and not is_finished(trial):
                self.notes[trial.name] = f"stopped at rung {self._rung}, step {self._step}"
        self._alive = [self._alive[place] for place in kept]
        goes_on = ", ".join(f"{trial.name} ({scores_text(scores, place)})" for place, trial in zip(kept, self._alive))
        logger.info(f"rung {self._rung}, step {self._step}: of {len(scores)} trials {len(kept)} go on: {goes_on}")
        self._rung += 1
        self._step *= self._factor


def scores_text(scores: Sequence[float | None], place: int) -> str:
    """Return a score as people read it."""
    score = scores[place]
    return "no score" if score is None else f"{score:.4f}"


def last_score(folder: Path, metric: str) -> float | None:
    """Return what a finished trial has come to; ``None`` where it has no such score."""
    summary = find_summary(folder)
    value = summary.get("train_loss") if metric == "train_loss" else (summary.get("metrics") or {}).get(metric)
    return None if value is None else float(value)
