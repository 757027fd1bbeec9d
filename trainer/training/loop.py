"""The training loop: one page of plain calls.

Everything that decides what a step does is computed alike on every rank, or carried by the one small all-reduce of
``_reduce_step_status``; so the ranks log, evaluate, save and stop at the same steps without asking each other.
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint import checkpointer as checkpoint
from trainer.config.schema import TrainConfig
from trainer.data.batching.global_batch import ends_epoch, global_batch
from trainer.data.batching.micro_batch import MicroBatch
from trainer.data.batching.packing import Packing
from trainer.data.load import Data
from trainer.distributed.process_group import World, gather_objects, sum_over_ranks
from trainer.engine.engine import Engine, Update
from trainer.engine.meter import Meter
from trainer.engine.optimizer import learning_rate, peak_learning_rate
from trainer.engine.rank_allocation import Allocation
from trainer.errors import TrainingError
from trainer.evaluation.evaluate import Scores, evaluate
from trainer.evaluation.generator import Generator
from trainer.tracking.tracker import Tracker
from trainer.training.monitor import Decision, EvalMonitor
from trainer.training.stop_request import StopRequest


@dataclass(slots=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: ``finished`` or ``preempted``.
        steps: updates taken.
        train_loss: of the last one.
        scores: of the weights that the run ends with.
        best_step: whose weights these are, where ``eval.best_metric`` chooses.
        stopped_early: why there were fewer updates than planned.
    """

    status: str
    steps: int
    train_loss: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    stopped_early: str | None = None


@dataclass(slots=True)
class Loop:
    """A run in progress: everything that a step needs."""

    config: TrainConfig
    world: World
    data: Data
    packing: Packing
    engine: Engine
    generator: Generator
    tracker: Tracker
    meter: Meter
    stop: StopRequest
    run: Path
    who: dict[str, Any]
    allocation: Allocation | None = None
    monitor: EvalMonitor = field(init=False)

    def __post_init__(self) -> None:
        self.monitor = EvalMonitor(self.config.eval)

    @property
    def total_steps(self) -> int:
        """Updates of the whole run."""
        return self.data.total_steps(self.config.batch)

    def train(self, first_step: int, watched: dict[str, Any] | None = None) -> Outcome:
        """Train from ``first_step`` (updates already taken) to the end, or until asked to stop.

        ``watched`` is what the checkpoint of ``first_step`` knows of the evaluations.
        """
        keys, outcome = self.config, Outcome("finished", first_step)
        rows, saved = len(self.data.train), first_step
        self._take_up_watch(watched)
        if first_step == 0 and keys.eval.before and len(self.data.validation):
            scores = self._evaluate().metrics
            self.monitor.evaluated(0, scores)
            self.tracker.log({"step": 0, "epoch": 0.0, **scores})
        for step in range(first_step, self.total_steps):
            try:
                record, stopping = self._step(step)
            except TrainingError:  # on every rank alike, and before the update: what there is, is good
                if step > saved:
                    self._save(step)
                raise
            done, decision = step + 1, Decision()
            outcome.steps, outcome.train_loss = done, record["loss"]
            self.monitor.trained(record["loss"])
            ends_pass = ends_epoch(step, rows, keys.batch.global_size)
            is_last = done == self.total_steps
            if len(self.data.validation) and (
                is_last or _due(done, keys.eval.every_steps, keys.eval.every_epoch and ends_pass)
            ):
                outcome.scores = self._evaluate().metrics
                record |= outcome.scores
                decision = self.monitor.evaluated(done, outcome.scores)
            self.tracker.log(record)
            if decision.warning:
                self.tracker.alert("overfitting", decision.warning)
            if is_last or decision.stop:
                outcome.stopped_early = None if is_last else decision.stop
                break
            due = _due(done, keys.checkpoint.every_steps, keys.checkpoint.every_epoch and ends_pass)
            if stopping or due or decision.is_best:
                if self._save(done):
                    saved = done
                elif decision.is_best:
                    self.monitor.not_saved()
            if stopping:
                return Outcome("preempted", saved, outcome.train_loss)
        self._end_with_best(outcome)
        return outcome

    def _step(self, step: int) -> tuple[dict[str, Any], bool]:
        """One update. Returns its record for metrics.jsonl, and whether any rank was asked to stop."""
        begin = time.perf_counter()
        keys, train = self.config, self.data.train
        chosen = global_batch(keys.run.seed, step, len(train), keys.batch.global_size)
        examples, label_tokens = train.tokens(chosen), train.label_tokens(chosen)
        layout = self.packing.split(examples, self.world.world_size)
        batches = list(self.packing.batches(examples, layout, self.world.rank, chosen))
        seeds = [_seed(keys.run.seed, step, self.world.rank, k) for k in range(len(batches))]
        data_seconds = time.perf_counter() - begin

        sums, gradients_finite = self.engine.accumulate(batches, self.world.world_size / label_tokens, seeds)
        loss, stopping = self._reduce_step_status(step, batches, sums, gradients_finite, label_tokens)
        rate = learning_rate(step, self.total_steps, peak_learning_rate(keys), keys.schedule)
        if self.allocation is not None:
            self.allocation.before_update(step + 1)
        update = self.engine.update(rate)
        if self.allocation is not None:
            self.allocation.after_update(step + 1, update)
        self._check_update(step, update, chosen)

        useful = sum(len(e.ids) for e in examples)
        record = {
            "step": step + 1,
            "epoch": (step + 1) * keys.batch.global_size / len(train),
            "loss": loss,
            "grad_norm": update.grad_norm,
            "learning_rate": rate,
            "label_tokens": label_tokens,
            **self.meter.measure(time.perf_counter() - begin, data_seconds, useful, layout.computed_tokens),
        }
        if self.engine.dtype == torch.float16:
            record["loss_scale"] = self.engine.loss_scale
        return record, stopping

    def _reduce_step_status(
        self, step: int, batches: list[MicroBatch], sums: list[float], gradients_finite: bool, label_tokens: int
    ) -> tuple[float, bool]:
        """The one all-reduce of a step: the global mean loss, whether to stop, and which ranks met a value that is not
        finite. Raises before the optimizer has seen it."""
        loss_bad = [k for k, s in enumerate(sums) if not math.isfinite(s)]
        # In fp16 an overflowing gradient is the loss scaler's daily work, not a failure.
        bad = bool(loss_bad) or (not gradients_finite and self.engine.dtype != torch.float16)
        flags = [float(bad and rank == self.world.rank) for rank in range(self.world.world_size)]
        total, stops, *bad_ranks = sum_over_ranks(
            [0.0 if bad else sum(sums), float(self.stop.wanted), *flags], self.world.device
        )
        if any(bad_ranks):
            guilty = [batches[k] for k in loss_bad] or batches
            what = "loss" if loss_bad else "gradient"
            reports = gather_objects((what, self._names([r for b in guilty for r in b.rows])) if bad else None)
            rank, (what, rows) = next((rank, r) for rank, r in enumerate(reports) if r is not None)
            raise _not_finite(what, step, rank, rows)
        return total / label_tokens, stops > 0

    def _check_update(self, step: int, update: Update, chosen: Any) -> None:
        if update.applied:
            return
        if self.engine.dtype == torch.float16:
            self.tracker.say(
                f"step {step + 1}: fp16 overflow, update skipped, loss scale now {self.engine.loss_scale:g}"
            )
            return
        raise _not_finite("gradient norm", step, None, self._names([int(r) for r in chosen]))

    def _names(self, rows: list[int]) -> str:
        names = self.data.train.names(rows[:16])
        return ", ".join(names) + (f" and {len(rows) - 16} more" if len(rows) > 16 else "")

    def _evaluate(self) -> Scores:
        self.engine.eval()
        scores = evaluate(self.engine, self.generator, self.packing, self.data, self.config, self.world)
        self.engine.train()
        if scores.samples:
            self.tracker.samples(
                [{"prompt": s.prompt, "reference": s.reference, "answer": s.answer} for s in scores.samples]
            )
        return scores

    def _save(self, done: int) -> bool:
        keys, say, monitor = self.config.checkpoint, self.tracker.say, self.monitor
        return checkpoint.save(
            self.engine, self.run, done, self.who, keys, say, self.allocation, monitor.state(), monitor.best_step
        )

    def _take_up_watch(self, watched: dict[str, Any] | None) -> None:
        """Go on watching. A run that goes back to an older checkpoint may have lost what was the best then."""
        self.monitor = EvalMonitor(self.config.eval, watched)
        best_step = self.monitor.best_step
        if best_step is not None:
            _, fault = checkpoint.find_step(self.run, best_step, self.world)
            if fault is not None:
                self.tracker.say(f"warning: the best evaluation so far, of step {best_step}, is given up: {fault}")
                self.monitor.lose_best()

    def _end_with_best(self, outcome: Outcome) -> None:
        """Put the weights of the best evaluation back, where ``eval.best_metric`` asks for them. A collective."""
        if self.config.eval.best_metric is None:
            return
        best, outcome.best_step = self.monitor.best, outcome.steps
        if best is None or best["step"] == outcome.steps:
            return
        folder, fault = checkpoint.find_step(self.run, best["step"], self.world)
        if fault is not None:
            self.tracker.say(f"warning: the best weights cannot be put back, the last ones are kept: {fault}")
            return
        checkpoint.load(self.engine, folder, self.who, self.allocation)
        outcome.best_step, outcome.scores = best["step"], best["scores"]


def _due(done: int, every_steps: int, at_epoch_end: bool) -> bool:
    return at_epoch_end or (every_steps > 0 and done % every_steps == 0)


def _seed(seed: int, step: int, rank: int, micro: int) -> int:
    """A 63-bit seed of its own for every forward, so that no random state need be saved."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}/{micro}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _not_finite(what: str, step: int, rank: int | None, rows: str) -> TrainingError:
    where = f"step {step + 1}" + ("" if rank is None else f", rank {rank}")
    error = TrainingError(
        f"{where}",
        reason=f"the {what} is not finite; the update was not made; rows {rows}",
        hint="look at these rows, lower optim.learning_rate, or model.dtype=fp32",
    )
    error.rank = rank or 0
    return error
