"""Make one update of each trial of a group: a forward and backward for all, an optimizer step for each."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from trainer.data.run_data import Data
from trainer.data.step_batches import StepBatches
from trainer.distributed.process_group import World, sum_over_ranks
from trainer.engine.engine import Update
from trainer.engine.meter import Meter
from trainer.errors import TrainingError
from trainer.together.batches import GroupBatches
from trainer.together.engine import TrialsEngine
from trainer.together.trial import Trial
from trainer.training.dropout_seed import dropout_seed
from trainer.training.not_finite import check_norm, first_not_finite
from trainer.training.outcome import StepResult
from trainer.training.stop_request import StopRequest


@dataclass(frozen=True, slots=True)
class _Status:
    """What the ranks tell each other in a step.

    Attributes:
        losses: of each trial, the mean over the label tokens of the global batch.
        failed: the trials that have met a value that is not finite, and where.
        stop_requested, computed_flops, save_due: as in ``StepStatus``.
    """

    losses: list[float]
    failed: dict[Trial, TrainingError]
    stop_requested: bool
    computed_flops: float
    save_due: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStep:
    """What an update of a group needs.

    Attributes:
        engine: of the base with the adapters of all trials.
        batches: of each step, for so many trials.
        data: the rows of all of them.
        world: this process.
        meter: of what a step costs.
        stop: set when the process is asked to stop.
        stage: told what is done, by ``Heartbeat.stage``.
    """

    engine: TrialsEngine
    batches: GroupBatches
    data: Data
    world: World
    meter: Meter
    stop: StopRequest
    stage: Callable[..., None]

    def update(
        self, step: int, trials: Sequence[Trial], left_out: Collection[Trial] = ()
    ) -> dict[Trial, StepResult | TrainingError]:
        """Make one update of each trial: the global batch, gradient accumulation over its micro-batches, the steps of
        the optimizer. A collective.

        Args:
            step: updates that each of them has taken.
            trials: that are trained.
            left_out: those of them that take no update. They are in the forward all the same, as they were when the
                step failed: the bits of the others are those of a group that was not started again since.

        Returns:
            The result of each other one; where its loss or gradient is not finite, the error: the optimizer has not
            seen it.
        """
        begin = time.perf_counter()
        self.stage("data", step + 1)
        made = self.batches.load(step, len(trials))
        data_seconds = time.perf_counter() - begin
        seed = trials[0].loop.config.run.seed
        seeds = [dropout_seed(seed, step, self.world.rank, k) for k in range(len(made.batches))]
        on_progress = partial(self.stage, "forward and backward")
        on_progress()
        scale = self.world.world_size / made.label_tokens
        chunks = self.batches.chunks([trial.adapter for trial in trials])
        sums, finite = self.engine.accumulate_trials(made.batches, scale, seeds, chunks, on_progress)
        self.stage("reduce")
        status = self._reduce(step, trials, made, sums, finite)
        self.stage("update")
        updated = [trial for trial in trials if trial not in status.failed and trial not in left_out]
        rates = {trial.adapter: trial.loop.schedule.learning_rate(step) for trial in updated}
        updates = self.engine.update_trials(rates)
        seconds = time.perf_counter() - begin
        costs = self.meter.measure(seconds, data_seconds, made, status.computed_flops, len(trials))
        results: dict[Trial, StepResult | TrainingError] = {}
        for trial, loss in zip(trials, status.losses, strict=True):
            if trial in left_out:
                continue
            error = status.failed.get(trial) or self._norm_error(step, updates[trial.adapter], made)
            if error is not None:
                results[trial] = error
                continue
            record = trial.loop.step_record(step, loss, updates[trial.adapter], made.label_tokens, costs)
            results[trial] = StepResult(record, status.stop_requested, status.save_due)
        return results

    def _reduce(self, step: int, trials: Sequence[Trial], made: StepBatches, sums: Tensor, finite: Tensor) -> _Status:
        """Run the one all-reduce of a step. The device is waited for once, when the sums over ranks are read."""
        count, ranks = len(trials), self.world.world_size
        bad = ~(sums.isfinite().all(0) & finite)
        mine = torch.zeros(3 + count + count * ranks, dtype=torch.float64, device=sums.device)
        mine[0] = float(self.stop.wanted)
        mine[1] = count * self.meter.flops.of_batches(made.batches)
        mine[2] = float(self.world.is_main and any(trial.loop.save_timer.is_due() for trial in trials))
        mine[3 : 3 + count] = sums.double().sum(0).masked_fill(bad, 0)
        mine[3 + count :].view(count, ranks)[:, self.world.rank] = bad.double()
        stops, flops, saves, *rest = sum_over_ranks(mine, self.world.device)
        failed: dict[Trial, TrainingError] = {}
        for k, trial in enumerate(trials):
            by_rank = rest[count + k * ranks : count + (k + 1) * ranks]
            if any(by_rank):
                here = by_rank[self.world.rank] > 0
                failed[trial] = first_not_finite(step, made.batches, sums[:, k].tolist(), here, self.data.train)
        losses = [total / made.label_tokens for total in rest[:count]]
        return _Status(losses, failed, stops > 0, flops, saves > 0)

    def _norm_error(self, step: int, update: Update, made: StepBatches) -> TrainingError | None:
        try:
            check_norm(step, update, made.chosen, self.data.train, self.engine)
        except TrainingError as error:
            return error
        return None
