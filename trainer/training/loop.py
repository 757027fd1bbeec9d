"""Train: the training loop, one page of plain calls.

Everything that decides what a step does is computed alike on every rank, or carried by the one small all-reduce of
``_reduce_step_status``; so the ranks log, evaluate, save and stop at the same steps without asking each other.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from trainer.checkpoint.checkpointer import Checkpointer
from trainer.config.schema import TrainConfig
from trainer.data.batching.micro_batch import MicroBatch
from trainer.data.batching.packing import Packing
from trainer.data.run_data import Data
from trainer.data.step_batches import StepBatches, StepLoader
from trainer.distributed.process_group import World, gather_objects, sum_over_ranks
from trainer.engine.engine import Engine, Update
from trainer.engine.meter import Meter
from trainer.errors import TrainingError
from trainer.evaluation.evaluate import EvalResult, evaluate
from trainer.evaluation.generator import Generator
from trainer.tracking.tracker import Tracker
from trainer.training.monitor import Decision, EvalMonitor
from trainer.training.schedule import Schedule
from trainer.training.stop_request import StopRequest

NAMED_ROWS = 16  # in an error

logger = logging.getLogger(__name__)


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
    """

    status: str
    steps: int
    train_loss: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    stopped_early: str | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """One update: its record for metrics.jsonl, and whether any rank was asked to stop."""

    record: dict[str, Any]
    stop_requested: bool


@dataclass(frozen=True, slots=True)
class StepStatus:
    """What the ranks tell each other in a step.

    Attributes:
        loss: mean over the label tokens of the global batch.
        stop_requested: whether any rank was asked to stop.
        computed_flops: what the devices computed, over all ranks.
    """

    loss: float
    stop_requested: bool
    computed_flops: float


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

    def train(self, first_step: int) -> Outcome:
        """Train from ``first_step`` (updates already taken) to the end, or until asked to stop."""
        outcome, saved = Outcome("finished", first_step), first_step
        if first_step == 0 and self.config.eval.before and self.schedule.has_validation:
            self._evaluate_before()
        self.meter.start()
        for step in range(first_step, self.schedule.total_steps):
            result = self._step_or_save(step, saved)
            done, due, decision = step + 1, self.schedule.due(step + 1), Decision()
            outcome.steps, outcome.train_loss = done, result.record["loss"]
            self.monitor.trained(result.record["loss"])
            if due.evaluation:
                outcome.scores = self.evaluate().metrics
                decision = self.monitor.evaluated(done, outcome.scores)
            self.tracker.log({**result.record, **(outcome.scores if due.evaluation else {})})
            if decision.warning:
                self.tracker.alert("overfitting", decision.warning)
            if due.is_last or decision.stop:
                outcome.stopped_early = None if due.is_last else decision.stop
                break
            if (result.stop_requested or due.checkpoint or decision.is_best) and self._save(done, decision):
                saved = done
            if result.stop_requested:
                return Outcome("preempted", saved, outcome.train_loss)
        self._end_with_best(outcome)
        return outcome

    def step(self, step: int) -> StepResult:
        """Make one update: the global batch, gradient accumulation over its micro-batches, the optimizer step.

        Args:
            step: updates taken before it.

        Raises:
            TrainingError: a loss or gradient is not finite; on every rank alike, and before the optimizer has seen it.
        """
        begin = time.perf_counter()
        made = self.loader.load(step)
        data_seconds = time.perf_counter() - begin
        seeds = [_dropout_seed(self.config.run.seed, step, self.world.rank, k) for k in range(len(made.batches))]
        sums, gradients_finite = self.engine.accumulate(made.batches, self.world.world_size / made.label_tokens, seeds)
        status = self._reduce_step_status(step, made, sums, gradients_finite)
        update = self._update(step)
        self._check_update(step, update, made.chosen)

        record = {
            "step": step + 1,
            "epoch": self.schedule.epoch(step + 1),
            "loss": status.loss,
            "grad_norm": update.grad_norm,
            "learning_rate": self.schedule.learning_rate(step),
            "label_tokens": made.label_tokens,
            **self.meter.measure(time.perf_counter() - begin, data_seconds, made, status.computed_flops),
        }
        if self.engine.dtype == torch.float16:
            record["loss_scale"] = self.engine.loss_scale
        return StepResult(record, status.stop_requested)

    def evaluate(self) -> EvalResult:
        """Score the held-out rows and show samples. A collective."""
        self.engine.eval()
        scores = evaluate(self.engine, self.generator, self.packing, self.data, self.config, self.world)
        self.engine.train()
        if scores.samples:
            rows = [{"prompt": s.prompt, "reference": s.reference, "answer": s.answer} for s in scores.samples]
            self.tracker.samples(rows)
        return scores

    def _evaluate_before(self) -> None:
        scores = self.evaluate().metrics
        self.monitor.evaluated(0, scores)
        self.tracker.log({"step": 0, "epoch": 0.0, **scores})

    def _step_or_save(self, step: int, saved: int) -> StepResult:
        """Make one update; where it fails, save what there is: it is from before the failure, and good."""
        try:
            return self.step(step)
        except TrainingError:
            if step > saved:
                self._save(step, Decision())
            raise

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
        mine = torch.zeros(3 + self.world.world_size, dtype=torch.float64, device=sums.device)
        mine[0] = sums.double().sum().masked_fill(failed, 0)
        mine[1] = float(self.stop.wanted)
        mine[2] = self.meter.flops.of_batches(made.batches)
        mine[3 + self.world.rank] = failed
        total, stops, computed_flops, *failed_ranks = sum_over_ranks(mine, self.world.device)
        if any(failed_ranks):
            self._raise_not_finite(step, made.batches, sums.tolist(), failed_ranks[self.world.rank] > 0)
        return StepStatus(total / made.label_tokens, stops > 0, computed_flops)

    def _raise_not_finite(self, step: int, batches: list[MicroBatch], sums: list[float], failed: bool) -> NoReturn:
        """Raise, on every rank alike, what the first rank that ``failed`` has met."""
        suspects = [batch for batch, value in zip(batches, sums, strict=True) if not math.isfinite(value)]
        what = "loss" if suspects else "gradient"
        mine = (what, self._row_names([r for b in suspects or batches for r in b.rows])) if failed else None
        rank, (what, rows) = next((rank, r) for rank, r in enumerate(gather_objects(mine)) if r is not None)
        raise _not_finite(what, step, rank, rows)

    def _check_update(self, step: int, update: Update, chosen: np.ndarray) -> None:
        if update.applied:
            return
        if self.engine.dtype != torch.float16:
            raise _not_finite("gradient norm", step, None, self._row_names([int(r) for r in chosen]))
        logger.info(f"step {step + 1}: fp16 overflow, update skipped, loss scale now {self.engine.loss_scale:g}")

    def _row_names(self, rows: list[int]) -> str:
        names = self.data.train.names(rows[:NAMED_ROWS])
        return ", ".join(names) + (f" and {len(rows) - NAMED_ROWS} more" if len(rows) > NAMED_ROWS else "")

    def _save(self, done: int, decision: Decision) -> bool:
        """Save a checkpoint; a new best that could not be saved is not the best."""
        monitor = self.monitor
        is_saved = self.checkpointer.save(done, monitor_state=monitor.state(), best_step=monitor.best_step)
        if decision.is_best and not is_saved:
            monitor.not_saved()
        return is_saved

    def _end_with_best(self, outcome: Outcome) -> None:
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


def open_monitor(config: TrainConfig, state: dict[str, Any] | None, checkpointer: Checkpointer) -> EvalMonitor:
    """Resume the monitor of evaluations from a checkpoint's state (``None``: fresh). A collective.

    A run that resumes from an older checkpoint may have lost what was the best then: it is given up.
    """
    monitor = EvalMonitor(config.eval, state)
    if monitor.best_step is not None:
        _, corruption = checkpointer.inspect(monitor.best_step)
        if corruption is not None:
            logger.warning(f"the best evaluation so far, of step {monitor.best_step}, is given up: {corruption}")
            monitor.lose_best()
    return monitor


def _dropout_seed(seed: int, step: int, rank: int, micro: int) -> int:
    """Return a 63-bit seed of its own for every forward, so that no random state need be saved."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}/{micro}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _not_finite(what: str, step: int, rank: int | None, rows: str) -> TrainingError:
    error = TrainingError(
        f"step {step + 1}" + ("" if rank is None else f", rank {rank}"),
        reason=f"the {what} is not finite; the update was not made; rows {rows}",
        hint="look at these rows, lower optim.learning_rate, or model.dtype=fp32",
    )
    error.rank = rank or 0
    return error
