"""Plan a run: its learning rate, and what is due after each update. Pure numbers, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.config.schema import TrainConfig
from trainer.data.batching.global_batch import ends_epoch
from trainer.engine.learning_rate import learning_rate, peak_learning_rate


@dataclass(frozen=True, slots=True)
class Due:
    """What the plan asks for after an update.

    Attributes:
        evaluation: score the held-out rows.
        checkpoint: save the state.
        is_last: no update is left.
        stop: the run is to stop here for now.
    """

    evaluation: bool
    checkpoint: bool
    is_last: bool
    stop: bool = False


@dataclass(frozen=True, slots=True)
class Schedule:
    """The plan of a run; a pure function of the step.

    Attributes:
        config: the whole configuration.
        total_steps: updates of the whole run.
        training_rows: rows of one pass over the data.
        has_validation: whether there are held-out rows to score.
    """

    config: TrainConfig
    total_steps: int
    training_rows: int
    has_validation: bool

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the update after ``step`` others."""
        return learning_rate(step, self.total_steps, peak_learning_rate(self.config), self.config.schedule)

    def epoch(self, done: int) -> float:
        """Return the passes over the data that ``done`` updates are."""
        return done * self.config.batch.global_size / self.training_rows

    def due(self, done: int) -> Due:
        """Return what is due after ``done`` updates (from 1)."""
        evaluation, checkpoint = self.config.eval, self.config.checkpoint
        is_last = done == self.total_steps
        ends_pass = ends_epoch(done - 1, self.training_rows, self.config.batch.global_size)
        evaluates = is_last or _is_due(done, evaluation.every_steps, evaluation.every_epoch and ends_pass)
        saves = _is_due(done, checkpoint.every_steps, checkpoint.every_epoch and ends_pass)
        stop_at = self.config.run.stop_at_step
        stops = stop_at is not None and done >= stop_at and not is_last
        return Due(evaluates and self.has_validation, saves or stops, is_last, stops)


def _is_due(done: int, every_steps: int, at_epoch_end: bool) -> bool:
    return at_epoch_end or (every_steps > 0 and done % every_steps == 0)
