"""Choose trials by optuna: at random, or by the tree-structured Parzen estimator (TPE; Bergstra et al., 2011).

Nothing is kept on disk: the same seed asks the same, so a sweep that is started again is told what its finished trials
have come to and chooses as it would have.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from launch.sweep.space import Space

if TYPE_CHECKING:
    from optuna.trial import Trial

DEFAULT_TRIALS = 20
# Of draws in a row that have been made before, after which there is taken to be nothing new.
PATIENCE = 200

Values = dict[str, str]
"""Of each axis, by its key, as typed."""


class Sampler:
    """Chooses the values of trials, each combination once.

    Args:
        space: what is varied, `sweep.sampler` and `sweep.seed`.
    """

    def __init__(self, space: Space) -> None:
        import optuna  # a second

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        settings = space.config.sweep
        if settings.sampler == "random":
            sampler: Any = optuna.samplers.RandomSampler(seed=settings.seed)
        else:
            sampler = optuna.samplers.TPESampler(seed=settings.seed, constant_liar=True)
        self._study = optuna.create_study(
            direction="minimize" if space.lower_is_better else "maximize", sampler=sampler
        )
        self._space = space
        self._asked: dict[tuple[str, ...], Trial] = {}
        self._scores: dict[tuple[str, ...], float | None] = {}

    def ask(self) -> Values | None:
        """Return the values of a trial that was not asked for before; ``None`` where none is found any more."""
        for _ in range(PATIENCE):
            trial = self._study.ask()
            values = self._draw(trial)
            key = tuple(values.values())
            if key not in self._asked:
                self._asked[key] = trial
                return values
            self._tell(trial, self._scores.get(key))  # what it came to is known, or it is being tried
        return None

    def tell(self, values: Values, score: float | None) -> None:
        """Say what a trial has come to; ``None``: it has failed."""
        key = tuple(values.values())
        self._scores[key] = score
        self._tell(self._asked[key], score)

    def _tell(self, trial: Trial, score: float | None) -> None:
        from optuna.trial import TrialState

        if score is None or not math.isfinite(score):
            self._study.tell(trial, state=TrialState.FAIL)
        else:
            self._study.tell(trial, score)

    def _draw(self, trial: Trial) -> Values:
        values = {}
        for axis in self._space.axes:
            interval = axis.interval
            if interval is None:
                values[axis.key] = str(trial.suggest_categorical(axis.key, axis.values))
            elif interval.is_whole:
                low, high = math.ceil(interval.low), math.floor(interval.high)
                values[axis.key] = interval.text(trial.suggest_int(axis.key, low, high, log=interval.is_log))
            else:
                drawn = trial.suggest_float(axis.key, interval.low, interval.high, log=interval.is_log)
                values[axis.key] = interval.text(drawn)
        return values


def draw_all(space: Space) -> list[Values]:
    """Draw all trials of a random sweep; fewer than asked for where there are no more combinations."""
    sampler = Sampler(space)
    drawn = (sampler.ask() for _ in range(space.config.sweep.trials or DEFAULT_TRIALS))
    return [values for values in drawn if values is not None]
