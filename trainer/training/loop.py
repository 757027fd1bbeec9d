"""Train: the training loop, one page of plain calls.

Everything that decides what a step does is computed alike on every rank, or carried by the one small all-reduce of
``_reduce_step_status``; so the ranks log, evaluate, save and stop at the same steps without asking each other.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.checkpointer import Checkpointer
from trainer.config.schema import TrainConfig
from trainer.data.batching.packing import Packing
from trainer.data.run_data import Data
from trainer.data.step_batches import StepBatches, StepLoader
from trainer.distributed.process_group import World, sum_over_ranks
from trainer.engine.engine import Engine, Update
from trainer.engine.meter import Meter
from trainer.errors import NotFiniteError
from trainer.evaluation.evaluate import EvalResult, evaluate
from trainer.evaluation.generator import Generator
from trainer.tracking.tracker import Tracker
from trainer.training.dropout_seed import dropout_seed
from trainer.training.monitor import Decision, EvalMonitor
from trainer.training.not_finite import check_norm, first_not_finite
from trainer.training.outcome import Outcome, Progress, StepResult, StepStatus
from trainer.training.save_timer import SaveTimer
from trainer.training.schedule import Schedule
from trainer.training.skipped_steps import SkippedSteps
from trainer.training.stop_request import StopRequest, StopRequested

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """A run in progress: everything that a step needs."""

    config: TrainConfig
    world: World
    data: Data
    packing: Packing
    loader: StepLoader
    engine: Engine
    generator: Generator
    tracker: Tracker
    meter: Meter
    stop: StopRequest
    checkpointer: Checkpointer
    monitor: EvalMonitor
    schedule: Schedule
    save_timer: SaveTimer
    skipped: SkippedSteps
    stage: Callable[..., None]  # told what the loop does, by ``Heartbeat.stage``
    begin: float  # ``time.perf_counter()`` at the run's start, less what its earlier lives took

    def train(self, first_step: int, record: dict[str, Any] | None = None) -> Outcome:
        """Train from ``first_step`` (updates already taken) to the end, or until asked to stop.

        Args:
            first_step: of the checkpoint that the run is resumed from; 0 at a start.
            record: of that step. Checkpoints are from before the evaluation of their step, which is made now.
        """
        progress = Progress(Outcome("finished", first_step), first_step)
        outcome = progress.outcome
        try:
            self._raise_if_stopping("start")
            if self.evaluates_before(first_step):
                self.evaluated_before(self.evaluate())
            self.meter.start()
            ends = record is not None and self.end_step(record, progress)
            while not ends and outcome.steps < self.schedule.total_steps:
                if outcome.steps and self.schedule.due(outcome.steps).stop:
                    raise StopRequested  # after the step's evaluation: whoever asked for it may judge by that
                result = self.next_step(progress)
                if self.count_step(progress, result):
                    self.save(progress, result.record)
                if result.stop_requested:
                    self.tracker.log(result.record)
                    raise StopRequested
                ends = self.end_step(result.record, progress)
        except StopRequested:
            return progress.preempted()
        self.end_with_best(outcome)
        return outcome

    def count_step(self, progress: Progress, result: StepResult) -> bool:
        """Count an update, and return whether it is to be saved: before whatever follows on it."""
        progress.outcome.steps += 1
        if "loss" in result.record:
            self.monitor.trained(result.record["loss"])
        due = self.schedule.due(progress.outcome.steps)
        return result.stop_requested or due.checkpoint or due.evaluation or due.is_last or result.save_due

    def end_step(self, record: dict[str, Any], progress: Progress) -> bool:
        """Evaluate where it is due, log the step, and return whether the run ends with it."""
        outcome, done = progress.outcome, record["step"]
        outcome.train_loss = record.get("loss", outcome.train_loss)
        due, decision = self.schedule.due(done), Decision()
        if due.evaluation:
            state_before = self.monitor.state()
            outcome.scores = self.evaluate().metrics
            decision = self.monitor.evaluated(done, outcome.scores)
            # It was saved before its evaluation; where that failed, a new best is worth another try.
            if decision.is_best and progress.saved < done and not self.save(progress, record, state_before):
                self.monitor.not_saved()
            record = {**record, **outcome.scores}
        self.tracker.log(record)
        if decision.warning:
            self.tracker.alert("overfitting", decision.warning)
        outcome.stopped_early = None if due.is_last else decision.stop
        return due.is_last or decision.stop is not None

    def step(self, step: int) -> StepResult:
        """Make one update: the global batch, gradient accumulation over its micro-batches, the optimizer step.

        Args:
            step: updates taken before it.

        Raises:
            NotFiniteError: a loss or gradient is not finite; on every rank alike, and before the optimizer has seen it.
        """
        begin = time.perf_counter()
        self.stage("data", step + 1)
        made = self.loader.load(step)
        data_seconds = time.perf_counter() - begin
        seeds = [dropout_seed(self.config.run.seed, step, self.world.rank, k) for k in range(len(made.batches))]
        on_progress = partial(self.stage, "forward and backward")
        on_progress()
        scale = self.world.world_size / made.label_tokens
        sums, gradients_finite = self.engine.accumulate(made.batches, scale, seeds, on_progress)
        self.stage("reduce")
        status = self._reduce_step_status(step, made, sums, gradients_finite)
        self.stage("update")
        update = self._update(step)
        check_norm(step, update, made.chosen, self.data.train, self.engine)
        costs = self.meter.measure(time.perf_counter() - begin, data_seconds, made, status.computed_flops)
        record = self.step_record(step, status.loss, update, made.label_tokens, costs)
        if self.engine.dtype == torch.float16:
            record["loss_scale"] = self.engine.loss_scale
        return StepResult(record, status.stop_requested, status.save_due)

    def step_record(
        self, step: int, loss: float, update: Update, label_tokens: int, costs: dict[str, float | int]
    ) -> dict[str, Any]:
        """Build what metrics.jsonl holds of the update after ``step`` others; ``costs``: of the meter."""
        return {
            "step": step + 1,
            "epoch": self.schedule.epoch(step + 1),
            "loss": loss,
            "grad_norm": update.grad_norm,
            "learning_rate": self.schedule.learning_rate(step),
            "label_tokens": label_tokens,
            **costs,
            "elapsed_seconds": time.perf_counter() - self.begin,
        }

    def evaluate(self) -> EvalResult:
        """Score the held-out rows and show samples. A collective.

        Raises:
            StopRequested: a rank was asked to stop meanwhile.
        """
        self.stage("evaluate")
        self.engine.eval()
        parts = self.engine, self.generator, self.packing, self.data, self.config, self.world
        scores = evaluate(*parts, between_batches=partial(self._raise_if_stopping, "evaluate"))
        self.engine.train()
        self.show_samples(scores)
        return scores

    def show_samples(self, scores: EvalResult) -> None:
        """Show the answers of an evaluation, where there are any."""
        if scores.samples:
            rows = [{"prompt": s.prompt, "reference": s.reference, "answer": s.answer} for s in scores.samples]
            self.tracker.samples(rows)

    def evaluates_before(self, first_step: int) -> bool:
        """Return whether the untrained weights are scored."""
        return first_step == 0 and self.config.eval.before and self.schedule.has_validation

    def evaluated_before(self, scores: EvalResult) -> None:
        """Take the scores of the untrained weights."""
        self.monitor.evaluated(0, scores.metrics)
        self.tracker.log({"step": 0, "epoch": 0.0, **scores.metrics})

    def next_step(self, progress: Progress) -> StepResult:
        """Make the next update, or leave it out as ``fault.non_finite`` says. Where the run ends with it, what there is
        is saved: it is from before the failure, and good."""
        step = progress.outcome.steps = self.skipped.after(progress.outcome.steps)
        if step in self.skipped.first:
            return self.skipped_step(progress)
        try:
            return self.step(step)
        except NotFiniteError as error:
            return self.leave_out(progress, error)

    def leave_out(self, progress: Progress, error: NotFiniteError) -> StepResult:
        """Leave out the update that was not finite, where ``fault.non_finite`` lets the run go on; else save what there
        is and raise."""
        step = progress.outcome.steps
        if self.config.fault.non_finite == "stop" or self.skipped.is_stuck(step):
            if step > progress.saved:
                self.save(progress, None)
            raise error
        first_step = self._rewind(progress) if self.config.fault.non_finite == "rewind" else step
        self.skipped.add(first_step, step, error)
        steps = f"step {step + 1}" if first_step == step else f"steps {first_step + 1} to {step + 1}"
        logger.warning(f"{error}; the run goes on without {steps} (fault.non_finite)")
        return self.skipped_step(progress)

    def _rewind(self, progress: Progress) -> int:
        """Restore the newest checkpoint from before this step's own start; return its step. A collective."""
        step = progress.outcome.steps
        self.stage("save")  # it may last
        restored = self.checkpointer.go_back(step)
        if restored is None:
            return step
        self.monitor.restore(restored.monitor_state)
        progress.saved = restored.step
        return restored.step

    def skipped_step(self, progress: Progress) -> StepResult:
        """Return the result of a step without an update."""
        done = progress.outcome.steps + 1
        progress.outcome.skipped_steps = self.skipped.count(done)
        record = {"step": done, "epoch": self.schedule.epoch(done), "skipped_steps": progress.outcome.skipped_steps}
        return StepResult({**record, "elapsed_seconds": time.perf_counter() - self.begin}, False, False)

    def _update(self, step: int) -> Update:
        """Take the optimizer step with the method's own work around it."""
        runtime = self.engine.runtime
        runtime.before_update(step + 1)
        update = self.engine.update(self.schedule.learning_rate(step))
        runtime.after_update(step + 1, update.gradient_scale if update.applied else None)
        return update

    def _reduce_step_status(self, step: int, made: StepBatches, sums: Tensor, gradients_finite: Tensor) -> StepStatus:
        """Run the one all-reduce of a step. Raises, before the optimizer has seen it, when a rank has met a value that
        is not finite.

        The device is waited for once, when the sums over ranks are read.
        """
        losses_finite = sums.isfinite().all()
        # In fp16 an overflowing gradient is the loss scaler's daily work, not a failure.
        failed = ~losses_finite if self.engine.dtype == torch.float16 else ~(losses_finite & gradients_finite)
        mine = torch.zeros(4 + self.world.world_size, dtype=torch.float64, device=sums.device)
        mine[0] = sums.double().sum().masked_fill(failed, 0)
        mine[1] = float(self.stop.wanted)
        mine[2] = self.meter.flops.of_batches(made.batches)
        mine[3] = float(self.world.is_main and self.save_timer.is_due())
        mine[4 + self.world.rank] = failed
        total, stops, computed_flops, saves, *failed_ranks = sum_over_ranks(mine, self.world.device)
        if any(failed_ranks):
            self.engine.discard_gradients()
            failed_here = failed_ranks[self.world.rank] > 0
            raise first_not_finite(step, made.batches, sums.tolist(), failed_here, self.data.train)
        return StepStatus(total / made.label_tokens, stops > 0, computed_flops, saves > 0)

    def save(
        self, progress: Progress, record: dict[str, Any] | None, monitor_state: dict[str, Any] | None = None
    ) -> bool:
        """Save a checkpoint of the steps so far; ``monitor_state``: of before an evaluation that was made already."""
        monitor, step = self.monitor, progress.outcome.steps
        self.stage("save")
        state = monitor.state() if monitor_state is None else monitor_state
        begin = time.perf_counter()
        is_saved = self.checkpointer.save(step, monitor_state=state, best_step=monitor.best_step, record=record)
        progress.outcome.save_seconds = max(progress.outcome.save_seconds or 0.0, time.perf_counter() - begin)
        self.save_timer.restart()  # a disk that is full is not tried again at once
        if is_saved:
            progress.saved = step
        return is_saved

    def _raise_if_stopping(self, stage: str) -> None:
        self.stage(stage)
        self.stop.raise_if_any(self.world)

    def end_with_best(self, outcome: Outcome) -> None:
        """Restore the weights of the best evaluation, where ``eval.best_metric`` asks for them. A collective."""
        if self.config.eval.best_metric is None:
            return
        best, outcome.best_step = self.monitor.best, outcome.steps
        if best is None or best["step"] == outcome.steps:
            return
        folder, corruption = self.checkpointer.inspect(best["step"])
        if corruption is not None:
            logger.warning(f"the best weights cannot be restored, the last ones are kept: {corruption}")
            return
        self.checkpointer.restore(folder)
        outcome.best_step, outcome.scores = best["step"], best["scores"]
