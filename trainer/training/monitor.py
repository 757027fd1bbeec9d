"""Monitor the evaluations: best weights, early stopping, overfitting.

Plain numbers in, decisions out. Every rank feeds it the same numbers and decides the same. Its state is a small JSON
object that goes with each checkpoint, so that a resumed run decides as an undisturbed one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.config.schema import LOWER_IS_BETTER, EvalConfig
from trainer.errors import ConfigError

State = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Decision:
    """What follows from one evaluation.

    Attributes:
        is_best: it is a new best by ``eval.best_metric``, to be saved.
        warning: overfitting has begun: to be shown now.
        stop: why training is to end here (early stopping), or ``None``.
    """

    is_best: bool = False
    warning: str | None = None
    stop: str | None = None


class EvalMonitor:
    """The evaluations of a run so far, as far as they decide anything.

    Args:
        eval_config: the ``eval`` group.
        state: what :meth:`state` returned when the checkpoint was saved that the run resumes from. What it says of the
            best counts only if the same metric of the same rows is monitored now.
    """

    def __init__(self, eval_config: EvalConfig, state: Mapping[str, Any] | None = None) -> None:
        self.config = eval_config
        self.metric = eval_config.best_metric or ("eval_loss" if eval_config.patience is not None else None)
        self.monitored = [self.metric, eval_config.max_rows]
        self.restore(state)

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a state; ``None``: as at the start."""
        state = state or {}
        # Of the steps since the evaluation before.
        self.losses, self.steps = float(state.get("losses", 0.0)), int(state.get("steps", 0))
        self.is_overfitting = bool(state.get("is_overfitting", False))
        same = state.get("watched") == self.monitored
        self.best: State | None = state["best"] if same else None  # its step, value and all scores
        self.without_best = int(state["without_best"]) if same else 0
        self._best_before: State | None = None

    @property
    def best_step(self) -> int | None:
        """The step that the final weights would be of, so far; ``None`` where the last weights are wanted anyway."""
        return self.best["step"] if self.best is not None and self.config.best_metric else None

    def state(self) -> State:
        """Return what a checkpoint must keep, for a new ``EvalMonitor`` to resume from here."""
        return {
            "losses": self.losses,
            "steps": self.steps,
            "is_overfitting": self.is_overfitting,
            "watched": self.monitored,
            "best": self.best,
            "without_best": self.without_best,
        }

    def trained(self, loss: float) -> None:
        """Record one update; ``loss`` is the mean of its global batch, nats a label token."""
        self.losses += loss
        self.steps += 1

    def evaluated(self, step: int, scores: Mapping[str, float]) -> Decision:
        """Decide on the scores after ``step`` updates, by their names in metrics.jsonl. Those of step 0 decide nothing:
        untrained weights are not an end.

        Raises:
            ConfigError: the monitored metric is not among them: the held-out rows cannot have it.
        """
        if self.metric is not None and self.metric not in scores:
            reason = "no held-out row can be scored by it"
            raise ConfigError("eval.best_metric", value=self.metric, reason=reason, hint="eval.best_metric=eval_loss")
        if step == 0:
            return Decision()
        is_best = self._is_best(step, scores)
        gap, was_overfitting = self._gap(scores), self.is_overfitting
        self.is_overfitting = gap is not None
        self.losses, self.steps = 0.0, 0
        warning = None
        if gap is not None and not was_overfitting:
            hints = "fewer batch.epochs, a lower optim.learning_rate or more rows"
            if self.config.best_metric is None:
                hints += ", or end with the best weights: eval.best_metric=eval_loss"
            warning = f"step {step}: overfitting: {gap} (eval.overfit_gap={self.config.overfit_gap:g}) → {hints}"
        return Decision(is_best and self.config.best_metric is not None, warning, self._stop(gap))

    def not_saved(self) -> None:
        """Take the new best back, since it could not be saved: the one before is the best there is."""
        self.best = self._best_before

    def lose_best(self) -> None:
        """Forget the best: its checkpoint is no longer there."""
        self.best = None

    def _is_best(self, step: int, scores: Mapping[str, float]) -> bool:
        if self.metric is None:
            return False
        value = scores[self.metric]
        if not math.isfinite(value) or (self.best is not None and not self._beats(value, self.best["value"])):
            self.without_best += 1
            return False
        self._best_before = self.best
        self.best = {"step": step, "value": value, "scores": dict(scores)}
        self.without_best = 0
        return True

    def _beats(self, value: float, best: float) -> bool:
        return value < best if self.metric in LOWER_IS_BETTER else value > best

    def _gap(self, scores: Mapping[str, float]) -> str | None:
        """Describe both losses, where the held-out one is too far above."""
        limit, held_out = self.config.overfit_gap, scores.get("eval_loss")
        if limit is None or held_out is None or not self.steps:
            return None
        mean = self.losses / self.steps
        if not held_out - mean > limit:
            return None
        return f"eval_loss {held_out:.4f} is {held_out - mean:.4f} above the mean training loss {mean:.4f}"

    def _stop(self, gap: str | None) -> str | None:
        if gap is not None and self.config.stop_on_overfit:
            return f"overfitting: {gap}"
        patience = self.config.patience
        if patience is None or self.without_best < patience:
            return None
        times = "1 evaluation" if patience == 1 else f"{patience} evaluations in a row"
        return f"{times} without a new best {self.metric}"
