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
from launch.environment import ONE_RUNS_OWN, visible_gpus
from launch.stop_signals import stop_signals
from launch.sweep import report as ranking
from launch.sweep.halving import Halving, last_score
from launch.sweep.plan import Placement, plan, plan_sweep, why_not_planned
from launch.sweep.sampler import Sampler, Values
from launch.sweep.space import Space, read_space
from launch.trials import Job, Trial, run_shared, take_turns
from trainer.errors import ConfigError

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


def trials_at_once(space: Space) -> int:
    """Return how many trials run at once, by `sweep.parallel` and the GPUs of this machine.

    Raises:
        ConfigError: there are fewer devices than that.
    """
    wanted, gpus = space.config.sweep.parallel, visible_gpus()
    if space.config.launch.kind == "torchrun":
        if wanted not in ("auto", 1):
            reason = "launch=torchrun gives each trial all devices"
            raise ConfigError("sweep.parallel", value=wanted, reason=reason, hint="launch=here or sweep.parallel=1")
        return 1
    if wanted == "auto":
        return max(1, gpus)
    if 0 < gpus < wanted:
        reason = f"each trial has a GPU of its own, and {gpus} can be seen"
        raise ConfigError("sweep.parallel", value=wanted, reason=reason, hint=f"sweep.parallel={gpus}")
    return int(wanted)


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

    def run_all(self) -> int:
        """Run every trial to its end; return 0 or the exit code of a stop."""
        self.folder, self.trials = plan(self._space)
        self._announce(f"sweep of {len(self.trials)} runs")
        return self._run(self.trials, len(self.trials))

    def run_halved(self) -> int:
        """Run the trials from rung to rung, of which the best go on; return as :meth:`run_all`."""
        self.folder, self.trials = plan(self._space)
        self._announce(f"sweep of {len(self.trials)} runs, stopped early")
        halving = Halving(self._space, self.trials)
        while trials := halving.next_round():
            if stopped := self._run(trials, len(self.trials)):
                return stopped
            halving.decide(set(self.errors))
            self.notes = halving.notes
        return 0

    def run_chosen(self) -> int:
        """Run trials that are chosen by the results of those before; return as :meth:`run_all`."""
        placement, sampler = Placement(self._space), Sampler(self._space)
        self.folder = placement.folder
        self._announce(f"sweep of {placement.count} runs, chosen by {self._space.metric}")
        while len(self.trials) < placement.count:
            asked = (sampler.ask() for _ in range(min(self._at_once, placement.count - len(self.trials))))
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
        numbers = {trial.name: number for number, trial in enumerate(self.trials, 1)}

        def run(trial: Trial) -> Job:
            label = f"[{numbers[trial.name]}/{count}] {trial.name}"
            code, error = yield from run_shared(trial, label, self._space.config_file, self._crew)
            if code and code not in process.STOPPED:
                self.errors[trial.name] = error
            return code

        return take_turns([run(trial) for trial in trials], self._at_once)

    def _announce(self, what: str) -> None:
        at_once = f", {self._at_once} at once" if self._at_once > 1 else ""
        logger.info(f"{what}{at_once} in {self.folder}")
        if own := [name for name in ONE_RUNS_OWN if name in os.environ]:
            logger.info(f"not given to the trials: {', '.join(own)}, which one W&B run alone can have")
