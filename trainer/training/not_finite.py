"""Build the error for a step whose loss or gradient is not finite: which rank met it, and in which rows."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np
import torch

from trainer.data.batching.micro_batch import MicroBatch
from trainer.data.run_data import Rows
from trainer.distributed.process_group import gather_objects
from trainer.engine.engine import Update
from trainer.engine.zero_engine import ZeroEngine
from trainer.errors import NotFiniteError, TrainingError

NAMED_ROWS = 16  # in an error

logger = logging.getLogger(__name__)


def first_not_finite(
    step: int, batches: Sequence[MicroBatch], sums: Sequence[float], failed: bool, rows: Rows
) -> NotFiniteError:
    """Build what the first rank that ``failed`` has met, on every rank alike. A collective.

    Args:
        step: updates taken before it.
        batches: this rank's micro-batches.
        sums: the loss sum of each.
        failed: whether a loss or gradient of this rank is not finite.
        rows: the training rows.
    """
    suspects = [batch for batch, value in zip(batches, sums, strict=True) if not math.isfinite(value)]
    what = "loss" if suspects else "gradient"
    mine = (what, _names(rows, [r for b in suspects or batches for r in b.rows])) if failed else None
    rank, (what, names) = next((rank, r) for rank, r in enumerate(gather_objects(mine)) if r is not None)
    error = NotFiniteError(f"step {step + 1}, rank {rank}", reason=_reason(what, names), hint=_HINT)
    error.rank = rank
    return error


def check_norm(step: int, update: Update, chosen: np.ndarray, rows: Rows, engine: ZeroEngine) -> None:
    """Raise for an update whose gradient norm is not finite; in fp16, where it is the loss scale's, log it.

    Args:
        step: updates taken before it.
        update: as the engine took it, or did not.
        chosen: the rows of the global batch.
        rows: the training rows.
        engine: that took it.

    Raises:
        NotFiniteError: the update was not made.
        TrainingError: it was made, and the weights are spoiled.
    """
    if not math.isfinite(update.grad_norm) and (update.applied or engine.dtype != torch.float16):
        raise norm_not_finite(step, [int(row) for row in chosen], rows, was_applied=update.applied)
    if not update.applied:
        logger.info(f"step {step + 1}: fp16 overflow, update skipped, loss scale now {engine.loss_scale:g}")


def norm_not_finite(step: int, chosen: list[int], rows: Rows, *, was_applied: bool) -> TrainingError:
    """Build the error for a norm that is not finite though every rank's own gradient was: the sum has overflowed.

    Args:
        step: updates taken before it.
        chosen: the rows of the global batch.
        rows: the training rows.
        was_applied: the optimizer has taken the step: the weights are spoiled, and the step cannot be left out.
    """
    if was_applied:
        reason = "the norm of the reduced gradient has overflowed, and the weights are spoiled"
        error: TrainingError = TrainingError(f"step {step + 1}", reason=reason, hint="model.dtype=fp32")
    else:
        reason = _reason("gradient norm", _names(rows, chosen))
        error = NotFiniteError(f"step {step + 1}", reason=reason, hint=_HINT)
    error.rank = 0
    return error


_HINT = "look at these rows, lower optim.learning_rate, model.dtype=fp32, or fault.non_finite=skip"


def _reason(what: str, names: str) -> str:
    return f"the {what} is not finite; the update was not made; rows {names}"


def _names(rows: Rows, chosen: list[int]) -> str:
    names = rows.names(chosen[:NAMED_ROWS])
    return ", ".join(names) + (f" and {len(chosen) - NAMED_ROWS} more" if len(chosen) > NAMED_ROWS else "")
