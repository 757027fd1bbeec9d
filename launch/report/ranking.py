"""Rank runs: by which figure, in which order, and how much of a difference is the seed's."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.report.runs import Run
from trainer.config.schema import LOWER_IS_BETTER

SEEDS = ("run.seed", "method.seed")


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure of runs that differ only in their seeds: mean, sample standard deviation (``None`` of one), number."""

    mean: float
    deviation: float | None
    count: int


@dataclass(slots=True)
class Setting:
    """Runs that differ only in their seeds.

    Attributes:
        values: of the axes, by key.
        runs: all of them, the best first.
        rank: from 1; ``None`` while none of them is finished.
    """

    values: dict[str, Any]
    runs: list[Run]
    rank: int | None = None

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.is_finished]

    def spread(self, metric: str) -> Spread | None:
        """Return the spread of a figure over the finished runs; ``None`` where one of them does not have it."""
        return spread([run.score(metric) for run in self.finished])


def spread(values: Sequence[float | None]) -> Spread | None:
    """Return the spread of figures; ``None`` where there is none, or one is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def choose_metric(
    scores: Sequence[Mapping[str, float | None]], best_metrics: Collection[str | None], asked: str | None = None
) -> str:
    """Choose what runs are ranked by: runs compare only by the same number.

    Args:
        scores: of each finished run.
        best_metrics: the runs' ``eval.best_metric``.
        asked: ``sweep.metric``.

    Returns:
        What was asked for; their own best metric where it is one, else ``eval_loss``; ``train_loss`` where a run does
        not have that.
    """
    candidates = [asked, *(best_metrics if len(set(best_metrics)) == 1 else ()), "eval_loss"]
    shared = [name for name in candidates if name and all(each.get(name) is not None for each in scores)]
    return shared[0] if shared else "train_loss"


def is_lower_better(metric: str) -> bool:
    return metric in ("train_loss", *LOWER_IS_BETTER)


def sortable(value: float | None, metric: str) -> float:
    """Return a sort key: smaller is better, and what is no number comes last."""
    if value is None or math.isnan(value):
        return math.inf
    return value if is_lower_better(metric) else -value


def rank_settings(runs: Sequence[Run], axes: Sequence[str], metric: str) -> list[Setting]:
    """Group runs that differ only in their seeds, and rank the groups by their means, best first.

    Args:
        runs: in any order.
        axes: keys that tell the settings apart, the seeds left out; none: each run is a setting.
        metric: what they are ranked by.

    Returns:
        Those with a finished run by rank, then the others in the order given.
    """
    groups: dict[str, Setting] = {}
    for run in runs:
        values = {key: run.config.get(key) for key in axes}
        setting = groups.setdefault(repr(values) if axes else run.name, Setting(values, []))
        setting.runs.append(run)
    settings = list(groups.values())
    for setting in settings:
        setting.runs.sort(key=lambda run: sortable(run.score(metric) if run.is_finished else None, metric))
    ranked = [setting for setting in settings if setting.finished]
    ranked.sort(key=lambda setting: sortable(_mean(setting, metric), metric))
    for place, setting in enumerate(ranked, 1):
        setting.rank = place
    return ranked + [setting for setting in settings if not setting.finished]


def _mean(setting: Setting, metric: str) -> float | None:
    found = setting.spread(metric)
    return found.mean if found else None


def short_labels(keys: Sequence[str]) -> dict[str, str]:
    """Shorten keys to their last part, or keep the whole key where two would read alike."""
    count = Counter(key.rpartition(".")[2] for key in keys)
    return {key: key if count[key.rpartition(".")[2]] > 1 else key.rpartition(".")[2] for key in keys}
