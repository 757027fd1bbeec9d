"""Run a sweep: every trial is a run of its own, one after the other or several at once; then rank them in a table.

A sweep is a folder of run folders: ``<run.dir>/<sweep>/<trial>/``. Started again, it does what is left.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from launch import process
from launch.crew import Crew
from launch.environment import ONE_RUNS_OWN
from launch.stop_signals import stop_signals
from launch.sweep import report as ranking
from launch.sweep.fusing import fuse_of, trials_at_once
from launch.sweep.halving import Halving, last_score
from launch.sweep.plan import Placement, plan, plan_sweep, why_not_planned
from launch.sweep.sampler import Sampler, Values
from launch.sweep.space import Space, read_space
from launch.together import Outcomes, TrialGroup, group_trials
from launch.trials import Job, Trial, is_finished, run_shared, take_turns
from trainer.config.together import Group
from trainer.tracking.files import find_summary

__all__ = ["plan_sweep", "run_sweep", "why_not_planned"]

logger = logging.getLogger(__name__)


def run_sweep(overrides: Sequence[str], config_file: Path | None = None) -> int:
    """Run the trials and show the ranked table, also written to `sweep.csv`, `sweep.md` and `report.html`.

    A failed trial is reported and the others go on; a finished one is not redone. One that another process trains is
    waited for at the end, so that equal sweeps started together share the trials and show the same table.

    Returns:
        0 when all trials finished, 1 when any failed, 75 (or 128 + signal) when it was stopped.

    Raises:
        ConfigError: a combination cannot be used; nothing has been started.
    """
    space = read_space(overrides, config_file)
    at_once = trials_at_once(space)
    with stop_signals(), Crew(at_once) as crew:
        sweep = _Sweep(space, crew, at_once)
        if space.config.sweep.sampler == "tpe":
            stopped = sweep.run_chosen()
        elif space.config.sweep.early_stopping == "asha":
            stopped = sweep.run_halved()
        else:
            stopped = sweep.run_all()
    if sweep.trials:
        records = ranking.rank(sweep.trials, sweep.errors, space.config.sweep.metric, sweep.notes)
        ranking.write(sweep.folder, records)
        ranking.show(records)
        ranking.write_page(sweep.folder)
    return stopped or int(bool(sweep.errors))


def _steps(folder: Path) -> int:
    """Return the updates that a trial has taken."""
    return int(find_summary(folder).get("steps") or 0)


def _status(folder: Path) -> str | None:
    return find_summary(folder).get("status")


class _Sweep:
    """A sweep that runs: its trials so far, and what is known of them beyond their folders.

    Attributes:
        folder: of the sweep.
        trials: all so far, in their order.
        errors: why a trial failed, by its name.
        notes: what stands in the table for a trial's status, by its name.
    """

    def __init__(self, space: Space, crew: Crew, at_once: int) -> None:
        self.folder = Path()
        self.trials: list[Trial] = []
        self.errors: dict[str, str] = {}
        self.notes: dict[str, str] = {}
        self._space, self._crew, self._at_once = space, crew, at_once
        self._fuse = fuse_of(space)

    def run_all(self) -> int:
        """Run every trial to its end; return 0 or the exit code of a stop."""
        self.folder, self.trials = plan(self._space)
        self._announce(f"sweep of {len(self.trials)} runs")
        return self._run(self.trials, len(self.trials))

    def run_halved(self) -> int:
        """Run the trials from rung to rung, of which the best go on; return as :meth:`run_all`.

        Where one process trains all that are left it goes from rung to rung by itself; the rungs are then read again
        from what it has left, and whatever is missing is trained.
        """
        self.folder, self.trials = plan(self._space)
        self._announce(f"sweep of {len(self.trials)} runs, stopped early")
        halving, was_together = Halving(self._space, self.trials), False
        while trials := halving.next_round():
            if not was_together and self._is_one_group(halving.alive) and not all(map(is_finished, trials)):
                was_together = True
                if stopped := self._halve_together(halving):
                    return stopped
            # one that failed later was judged at this rung
            failed = {n for n in self.errors if len(halving.alive) == 1 or _steps(self.folder / n) < halving.step}
            known = set(self.errors)
            left = [trial for trial in trials if trial.name not in known]
            if was_together:
                left = [trial for trial in left if not is_finished(trial)]
            if stopped := self._run(left, len(self.trials)):
                return stopped
            halving.decide(failed | (self.errors.keys() - known))
            self.notes = halving.notes
            # what was left behind has no part in the death of a process that it was trained by before
            behind = {name for name in self.notes if _status(self.folder / name) != "failed"}
            self.errors = {name: error for name, error in self.errors.items() if name not in behind}
        return 0

    def _is_one_group(self, trials: Sequence[Trial]) -> bool:
        """Return whether one process can train all of these trials, and none of them has ended."""
        groups = self._grouped(trials)
        return len(groups) == 1 and len(trials) > 1 and not any(map(is_finished, trials))

    def _halve_together(self, halving: Halving) -> int:
        """Train the trials of the next rung together, from there to the end; return 0 or the exit code of a stop."""
        together = self._group(halving.alive, len(self.trials))
        outcomes = together.run_halved(halving.rules())
        self._remember(together)
        return self._note(outcomes)

    def run_chosen(self) -> int:
        """Run trials that are chosen by the results of those before; return as :meth:`run_all`."""
        placement, sampler = Placement(self._space), Sampler(self._space)
        self.folder = placement.folder
        self._announce(f"sweep of {placement.count} runs, chosen by {self._space.metric}")
        while len(self.trials) < placement.count:
            at_once = self._at_once * (1 if isinstance(self._fuse, str) else self._fuse)
            asked = (sampler.ask() for _ in range(min(at_once, placement.count - len(self.trials))))
            drawn: list[Values] = [values for values in asked if values is not None]
            if not drawn:
                logger.info(f"{len(self.trials)} trials are all that there are")
                return 0
            trials = placement.trials(drawn)
            self.trials += trials
            if stopped := self._run(trials, placement.count):
                return stopped
            for values, trial in zip(drawn, trials, strict=True):
                score = None if trial.name in self.errors else last_score(trial.folder, self._space.metric)
                sampler.tell(values, score)
        return 0

    def _run(self, trials: Sequence[Trial], count: int) -> int:
        """Run trials, some at once; note those that fail. Returns 0 or the exit code of a stop."""

        def run_alone(trial: Trial) -> Job:
            label = self._labels([trial], count)[trial.name]
            outcome = yield from run_shared(trial, label, self._space.config_file, self._crew)
            return self._note({trial.name: outcome})

        def run_together(members: Sequence[Trial]) -> Job:
            together = self._group(members, count)
            outcomes = yield from together.run()
            self._remember(together)
            return self._note(outcomes)

        groups = [[trials[place] for place in group.places] for group in self._grouped(trials)]
        return take_turns([run_alone(*g) if len(g) == 1 else run_together(g) for g in groups], self._at_once)

    def _remember(self, together: TrialGroup) -> None:
        """Put no more trials together than the model can be shared by."""
        if together.obstacle is not None:
            self._fuse = together.most

    def _grouped(self, trials: Sequence[Trial]) -> list[Group]:
        return group_trials(trials, self._fuse, self._at_once)

    def _group(self, trials: Sequence[Trial], count: int) -> TrialGroup:
        return TrialGroup(trials, self.folder, self._labels(trials, count), self._space.config_file, self._crew)

    def _labels(self, trials: Sequence[Trial], count: int) -> dict[str, str]:
        numbers = {trial.name: number for number, trial in enumerate(self.trials, 1)}
        return {trial.name: f"[{numbers[trial.name]}/{count}] {trial.name}" for trial in trials}

    def _note(self, outcomes: Outcomes) -> int:
        """Note which trials have failed; return 0 or the exit code of one that was stopped."""
        failed = {name: error for name, (code, error) in outcomes.items() if code and code not in process.STOPPED}
        self.errors |= failed
        return max((code for code, _ in outcomes.values() if code in process.STOPPED), default=0)

    def _announce(self, what: str) -> None:
        at_once = f", {self._at_once} at once" if self._at_once > 1 else ""
        logger.info(f"{what}{at_once} in {self.folder}")
        if own := [name for name in ONE_RUNS_OWN if name in os.environ]:
            logger.info(f"not given to the trials: {', '.join(own)}, which one W&B run alone can have")
