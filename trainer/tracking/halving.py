"""Successive halving (the rungs of ASHA; Li et al., 2020): which trials of a rung go on, by what their folders hold.

Whoever trains the trials, one by one or together, decides by these, so that both keep the same ones. The rules:

- At a rung all trials are judged that have not failed and were not left behind at an earlier one, in the sweep's order;
  one that has ended before the rung's step is judged by what it ended with.
- ``decide`` says which go on; the next rung is ``factor`` times as many updates away from the start.
- The last one is trained to its end; where all have ended, nothing is left to decide.

Loads no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import CheckpointError
from trainer.tracking.files import Record, read_metrics

# Losses of the last steps up to a rung that are averaged where nothing was scored: one step's is noise.
TRAIN_LOSS_STEPS = 10


def decide(scores: Sequence[float | None], factor: int, lower_is_better: bool) -> list[int]:
    """Return the places of the trials that go on: the best one in ``factor``, at least one.

    Args:
        scores: of the trials of a rung, as :func:`score_until` gives them.
        factor: `sweep.reduction_factor`.
        lower_is_better: whether they are losses.
    """
    return best(scores, max(1, len(scores) // factor), lower_is_better)


def best(scores: Sequence[float | None], count: int, lower_is_better: bool) -> list[int]:
    """Return the places of the best scores, in the order of places; of equals the earlier, and ``None`` last."""
    sign = 1 if lower_is_better else -1
    order = sorted(range(len(scores)), key=lambda place: _sortable(scores[place], sign))
    return sorted(order[:count])


def score_until(folder: Path, step: int, metric: str) -> float | None:
    """Return a trial's newest score up to a step; where there is none of that metric, its mean training loss.

    Args:
        folder: the run folder.
        step: lines of metrics.jsonl after it do not count: the run may have gone on in an earlier life of the sweep.
        metric: such as ``eval_loss``; ``train_loss`` is the mean over the last steps.
    """
    try:
        records = [record for record in read_metrics(folder) if 0 < record["step"] <= step]
    except CheckpointError:
        return None
    scored = _numbers(records, metric)
    if scored:
        return scored[-1]
    losses = _numbers(records, "loss")[-TRAIN_LOSS_STEPS:]
    return math.fsum(losses) / len(losses) if losses else None


def _sortable(score: float | None, sign: int) -> float:
    return math.inf if score is None or math.isnan(score) else sign * score


def _numbers(records: Sequence[Record], name: str) -> list[float]:
    return [float(record[name]) for record in records if record.get(name) is not None]
