"""Train the trials of a group: the training loop of one run, with every forward, backward and update made for all.

What a trial's step does is decided by its own schedule, monitor and checkpoints; here is only what is done together.
Trials that are behind (they joined from checkpoints of their own) are trained by themselves until they have caught up.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from trainer.errors import AfinaError, NotFiniteError, TrainingError
from trainer.evaluation.evaluate import EvalResult, evaluate_trials
from trainer.evaluation.generator import Generator
from trainer.together.rungs import Rungs
from trainer.together.saves import Saves, write_saves
from trainer.together.step import GroupStep
from trainer.together.trial import Trial
from trainer.tracking.terminal import Terminal
from trainer.training.outcome import Outcome, StepResult
from trainer.training.stop_request import StopRequested

logger = logging.getLogger(__name__)

ZERO_AT_START = ("default", "gaussian")  # values of method.init with B zero: the untrained trial is the base


@dataclass(slots=True, kw_only=True)
class GroupLoop:
    """A group in training.

    Attributes:
        folder: of the group's own files.
        trials: those that are still trained.
        step: makes their updates.
        generator: answers prompts for all active trials at once.
        scored: what trials were scored in an earlier life at the step that they are resumed after, by their labels.
        rungs: which trials are left behind, and when; ``None``: none are.
        terminal: shows the group's steps, on rank 0.
    """

    folder: Path
    trials: list[Trial]
    step: GroupStep
    generator: Generator
    scored: dict[str, Mapping[str, float]] = field(default_factory=dict)
    rungs: Rungs | None = None
    terminal: Terminal | None = None
    _held: int = field(default=0, init=False)

    def train(self) -> bool:
        """Train until every trial has ended, or until asked to stop; return whether all came to their end."""
        self._held = len(self.trials)
        try:
            self._raise_if_stopping("start")
            self._evaluate_before()
            self.step.meter.start()
            self._end_steps({trial: trial.record for trial in self.trials if trial.record is not None})
            while trials := self._up_next():
                self._end_updates(self._step(trials))
        except StopRequested:
            for trial in list(self.trials):
                self._finish(trial, trial.progress.preempted())
            return False
        return True

    def _up_next(self) -> list[Trial]:
        """Return the trials to train next: those that have taken the fewest updates. Ends those that are to stop."""
        for trial in list(self.trials):
            outcome = trial.progress.outcome
            outcome.steps = trial.loop.skipped.after(outcome.steps)
            if outcome.steps >= trial.loop.schedule.total_steps:  # it is asked for fewer than it has taken
                self._end(trial)
            elif outcome.steps and trial.loop.schedule.due(outcome.steps).stop:
                self._finish(trial, trial.progress.preempted())
        lowest = min((trial.steps for trial in self.trials), default=0)
        return [trial for trial in self.trials if trial.steps == lowest]

    def _step(self, trials: Sequence[Trial]) -> dict[Trial, StepResult]:
        """Make the next update of some trials that have taken as many; one that leaves it out has its record, too."""
        step = trials[0].steps
        results = {t: t.loop.skipped_step(t.progress) for t in trials if step in t.loop.skipped.first}
        made = self.step.update(step, trials, list(results)) if len(results) < len(trials) else {}
        self._show_losses(step, made)
        for trial, result in made.items():
            found = result if isinstance(result, StepResult) else self._leave_out(trial, result)
            if found is not None:
                results[trial] = found
        return results

    def _show_losses(self, step: int, made: Mapping[Trial, StepResult | TrainingError]) -> None:
        """Show the mean loss of the trials, their speed together, and the memory."""
        records = [result.record for result in made.values() if isinstance(result, StepResult)]
        if self.terminal is None or not records:
            return
        speed = math.fsum(record["useful_tokens_per_second"] for record in records)
        mean = math.fsum(record["loss"] for record in records) / len(records)
        self.terminal.step({**records[0], "loss": mean, "useful_tokens_per_second": speed, "learning_rate": None})

    def _show_scores(self, trials: Sequence[Trial], scores: Sequence[EvalResult]) -> None:
        """Show what an evaluation has given, a line a metric."""
        for name in scores[0].metrics if scores else ():
            each = [f"{trial.label} {found.metrics[name]:.4f}" for trial, found in zip(trials, scores, strict=True)]
            logger.info(f"step {trials[0].steps}: {name}: {', '.join(each)}")

    def _leave_out(self, trial: Trial, error: TrainingError) -> StepResult | None:
        """Leave out a trial's update, or end the trial where ``fault.non_finite`` lets it not go on."""
        found: list[StepResult] = []

        def leave_out() -> None:
            if not isinstance(error, NotFiniteError):
                raise error
            found.append(trial.loop.leave_out(trial.progress, error))

        self._guarded(trial, leave_out)
        return found[0] if found else None

    def _end_updates(self, results: Mapping[Trial, StepResult]) -> None:
        """Save all where one is to be saved, then evaluate, log, and end what has come to its end."""
        is_due = [trial.loop.count_step(trial.progress, result) for trial, result in results.items()]
        if any(is_due) or (self.rungs is not None and any(trial.steps == self.rungs.step for trial in results)):
            self._save(results)
        if any(result.stop_requested for result in results.values()):
            for trial, result in results.items():
                trial.loop.tracker.log(result.record)
            raise StopRequested
        self._end_steps({trial: result.record for trial, result in results.items()})

    def _save(self, results: Mapping[Trial, StepResult]) -> None:
        """Save each of some trials; then the common moment; only then may older checkpoints go."""
        for trial, result in results.items():
            trial.loop.save(trial.progress, result.record)
        self._write_saves({})
        for trial in results:
            trial.loop.checkpointer.prune(trial.loop.monitor.best_step)

    def _write_saves(self, scores: Mapping[str, Mapping[str, float]]) -> None:
        if self.step.world.is_main:
            steps = {trial.label: trial.progress.saved for trial in self.trials}
            write_saves(self.folder, Saves(steps, scores))

    def _end_steps(self, records: Mapping[Trial, dict[str, Any]]) -> None:
        """Evaluate where it is due, log the step of each trial, and end those that end with it."""
        due = [trial for trial in records if trial.loop.schedule.due(records[trial]["step"]).evaluation]
        scores = self._score(due)
        self._show_scores(due, scores)
        for trial, found in zip(due, scores, strict=True):
            trial.loop.scored.append(found)
        for trial, record in records.items():
            self._guarded(trial, partial(self._end_step, trial, record))
        if self.rungs is not None:
            behind = self.rungs.decide(self.trials)
            for trial in behind:
                self._finish(trial, trial.progress.preempted(), stopped_by="sweep.early_stopping")
        if len(self.trials) <= self._held // 2 and self.trials:
            self._held = len(self.trials)
            self.step.engine.rebuild([trial.adapter for trial in self.trials])

    def _end_step(self, trial: Trial, record: dict[str, Any]) -> None:
        with trial.own_lines():
            ends = trial.loop.end_step(record, trial.progress)
        if ends:
            self._end(trial)

    def _end(self, trial: Trial) -> None:
        trial.loop.end_with_best(trial.progress.outcome)
        self._finish(trial, trial.progress.outcome)

    def _guarded(self, trial: Trial, work: Callable[[], None]) -> None:
        """Do a trial's own work; what a user could fix of it ends the trial, and the others go on."""
        try:
            work()
        except AfinaError as error:
            trial.fail(error)
            self._forget(trial)

    def _finish(self, trial: Trial, outcome: Outcome, stopped_by: str | None = None) -> None:
        trial.finish(outcome, stopped_by)
        self._forget(trial)

    def _forget(self, trial: Trial) -> None:
        """Train a trial no more that has ended."""
        self.trials.remove(trial)
        if self.rungs is not None and trial.error is not None:
            self.rungs.failed(trial)
        logger.info(f"{trial.label}: {trial.result()}")

    def _evaluate_before(self) -> None:
        """Score the untrained weights of the trials that want it: those that are the base yet, once for all of them."""
        wanted = [t for t in self.trials if t.loop.evaluates_before(t.steps) and t.record is None]
        same = [trial for trial in wanted if trial.loop.config.method.init in ZERO_AT_START]
        others = [trial for trial in wanted if trial not in same]
        scores = [*self._evaluate(same[:1]) * len(same), *self._evaluate(others)]
        for trial, found in zip([*same, *others], scores, strict=True):
            self._guarded(trial, partial(trial.loop.evaluated_before, found))

    def _score(self, trials: Sequence[Trial]) -> list[EvalResult]:
        """Score the held-out rows with trials that have just been saved, but for those that an earlier life has scored;
        the scores are kept before any trial ends with them. A collective."""
        found = {t: EvalResult(dict(self.scored.pop(t.label)), []) for t in trials if t.label in self.scored}
        fresh = [trial for trial in trials if trial not in found]
        found.update(zip(fresh, self._evaluate(fresh), strict=True))
        if fresh:
            self._write_saves({trial.label: result.metrics for trial, result in found.items()})
        return [found[trial] for trial in trials]

    def _evaluate(self, trials: Sequence[Trial]) -> list[EvalResult]:
        """Score the held-out rows with each of some trials. A collective.

        Raises:
            StopRequested: a rank was asked to stop meanwhile.
        """
        if not trials:
            return []
        self.step.stage("evaluate")
        found: list[EvalResult] = []
        for chunk in self.step.batches.chunks(trials):
            self.step.engine.activate([trial.adapter for trial in chunk])
            self.step.engine.eval()
            found += evaluate_trials(
                self.step.engine,
                [trial.built.engine for trial in chunk],
                self.generator,
                self.step.batches.packing(len(chunk)),
                self.step.data,
                chunk[0].loop.config,
                self.step.world,
                between_batches=partial(self._raise_if_stopping, "evaluate"),
            )
        self.step.engine.train()
        return found

    def _raise_if_stopping(self, stage: str) -> None:
        self.step.stage(stage)
        self.step.stop.raise_if_any(self.step.world)
