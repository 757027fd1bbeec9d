"""Say how a step ended, how far a run is, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: ``finished`` or ``preempted``.
        steps: updates taken.
        train_loss: of the last one.
        scores: of the weights that the run ends with.
        best_step: the step that these weights are of, where ``eval.best_metric`` chooses.
        stopped_early: why there were fewer updates than planned (early stopping).
        skipped_steps: of ``steps``, those whose updates were left out (``fault.non_finite``).
        save_seconds: of the longest save of a checkpoint.
    """

    status: str
    steps: int
    train_loss: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    stopped_early: str | None = None
    skipped_steps: int = 0
    save_seconds: float | None = None


@dataclass(slots=True)
class Progress:
    """How far a run is: its outcome so far, and the last step that is saved."""

    outcome: Outcome
    saved: int

    def preempted(self) -> Outcome:
        """Return the outcome of a run that was stopped: what was saved last is what it has come to."""
        return Outcome("preempted", self.saved, self.outcome.train_loss, save_seconds=self.outcome.save_seconds)


@dataclass(frozen=True, slots=True)
class StepResult:
    """One update: its record for metrics.jsonl, whether any rank was asked to stop, and whether it is time to save."""

    record: dict[str, Any]
    stop_requested: bool
    save_due: bool


@dataclass(frozen=True, slots=True)
class StepStatus:
    """What the ranks tell each other in a step.

    Attributes:
        loss: mean over the label tokens of the global batch.
        stop_requested: whether any rank was asked to stop.
        computed_flops: what the devices computed, over all ranks.
        save_due: whether ``checkpoint.every_minutes`` have passed, by rank 0's clock.
    """

    loss: float
    stop_requested: bool
    computed_flops: float
    save_due: bool
