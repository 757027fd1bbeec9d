"""Gather what a folder holds: a run, a sweep or a comparison, finished or not."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.report.ranking import SEEDS, Setting, choose_metric, rank_settings
from launch.report.runs import SCORES, Run, read_run
from launch.report.values import differing_keys, parse_value
from trainer.errors import CheckpointError
from trainer.tracking.files import RUN_FILES

NEITHER_AXIS = ("run.name", "run.dir", "run.overwrite", "log.", "launch.", "compare.")
MAX_CSV_BYTES = 20_000_000


@dataclass(slots=True)
class Report:
    """Hold what there is to show.

    Attributes:
        kind: ``run``, ``sweep`` or ``comparison``.
        folder: of it.
        settings: ranked, best first; those without a finished run come last.
        metric: what they are ranked by.
        axes: the keys that were varied, the seeds left out.
        varied: all keys whose values differ between the runs.
    """

    kind: str
    folder: Path
    settings: list[Setting]
    metric: str
    axes: list[str] = field(default_factory=list)
    varied: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[Run]:
        """Return all runs, those of the best setting first."""
        return [run for setting in self.settings for run in setting.runs]

    @property
    def has_repeats(self) -> bool:
        """Return whether a setting has several runs."""
        return any(len(setting.runs) > 1 for setting in self.settings)

    @property
    def repeats(self) -> str:
        """Return what the runs of one setting are: seeds, or the same once more."""
        return "seeds" if set(SEEDS) & set(self.varied) else "runs"

    @property
    def scores(self) -> list[str]:
        """Return the figures that any run has, what they are ranked by first."""
        names = [name for name in SCORES if any(run.score(name) is not None for run in self.runs)]
        hidden = {"eval_perplexity"} - {self.metric}  # orders as eval_loss does
        return [self.metric, *(name for name in names if name != self.metric and name not in hidden)]

    def before(self, metric: str) -> float | None:
        """Return a figure of the model before training: the same for all that begin with the same model."""
        found = [run.score_before(metric) for run in self.runs]
        return next((value for value in found if value is not None), None)


def gather(folder: Path) -> Report:
    """Read a folder; which kind it is, is seen from its files.

    Raises:
        CheckpointError: there is no run in it.
    """
    if any((folder / name).is_file() for name in RUN_FILES):
        return _report("run", folder, [read_run(folder)], [])
    rows = _read_rows(folder / "compare.csv")
    if rows:
        return _report("comparison", folder, _comparison(folder, rows), [])
    rows = _read_rows(folder / "sweep.csv")
    runs = _sweep(folder, rows)
    if not runs:
        reason = "holds no run (no config.yaml there, and none in a folder of it)"
        raise CheckpointError("report", value=folder, reason=reason, hint="afina report runs/NAME")
    return _report("sweep", folder, runs, _swept_keys(rows))


def is_reportable(folder: Path) -> bool:
    """Return whether there is a run in a folder, or in a folder of it."""
    files = (*RUN_FILES, "sweep.csv", "compare.csv")
    return any((folder / name).is_file() for name in files) or any(folder.glob("*/config.yaml"))


def _report(kind: str, folder: Path, runs: list[Run], axes: Sequence[str]) -> Report:
    finished = [run for run in runs if run.is_finished]
    judged = finished or [run for run in runs if run.metrics]
    best_metrics = {_best_metric(run) for run in judged if run.config}
    scores = [{name: run.score(name) for name in SCORES} for run in judged]
    asked = {run.config.get("sweep.metric") for run in judged if run.config}
    metric = choose_metric(scores, best_metrics, asked.pop() if len(asked) == 1 else None)
    varied = [key for key in differing_keys([run.config for run in runs]) if not key.startswith(NEITHER_AXIS)]
    if kind == "sweep":
        axes = [key for key in (axes or varied) if key not in SEEDS]
    # by name where nothing tells them apart, or the methods are what is compared
    settings = rank_settings(runs, axes if kind == "sweep" else (), metric)
    return Report(kind, folder, settings, metric, list(axes), varied)


def _best_metric(run: Run) -> str | None:
    found = run.config.get("eval.best_metric")
    return found if found in SCORES else None


def _sweep(folder: Path, rows: Sequence[dict[str, str]]) -> list[Run]:
    """Read the runs of a sweep: all that have a folder, and those of its table that never had one."""
    runs = {path.parent.name: read_run(path.parent) for path in sorted(folder.glob("*/config.yaml"))}
    for row in rows:
        name = Path(row.get("folder") or "").name
        run = runs.setdefault(name, Run(name, None, row.get("status") or "not run"))
        _take_row(run, row)
        for key in _swept_keys(rows):
            run.config.setdefault(key, parse_value(row.get(key)))
    return list(runs.values())


def _swept_keys(rows: Sequence[dict[str, str]]) -> list[str]:
    """Return which columns of a sweep's table are keys or groups: `rank` there is the place."""
    import trainer.config

    keys: list[trainer.config.Key] = trainer.config.keys()
    known = {key.name for key in keys} | set(trainer.config.groups()) - {"rank"}
    return [name for name in (rows[0] if rows else ()) if name in known or name.startswith("zero.extra")]


def _comparison(folder: Path, rows: Sequence[dict[str, str]]) -> list[Run]:
    """Read the methods of a comparison; the first line of its table may be the base model's."""
    runs = []
    for row in rows:
        if row.get("status") == "base":
            continue
        place = folder / Path(row["folder"]).name if row.get("folder") else None
        method = row.get("method") or "?"
        is_there = place is not None and place.is_dir()
        run = read_run(place, method) if place and is_there else Run(method, None, row.get("status") or "not run")
        _take_row(run, row)
        try:
            run.tried = dict(json.loads(row.get("tried") or "{}"))
        except (ValueError, TypeError, RecursionError):
            run.notes.append(f"{method}: its tries of learning rates cannot be read")
        runs.append(run)
    return runs


def _take_row(run: Run, row: dict[str, str]) -> None:
    """Take from a table what the run folder cannot know: why nothing was started, or how the process ended."""
    status = row.get("status") or ""
    if not run.is_finished and run.status != "running":
        is_known = run.status not in ("not run", "unfinished")
        run.status = status if status in ("failed", "refused") or (status and not is_known) else run.status
        run.error = run.error or row.get("error") or None


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a table of ours; empty where there is none, or it cannot be read."""
    try:
        if path.stat().st_size > MAX_CSV_BYTES:
            return []
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, csv.Error):
        return []
    return [{str(key): value for key, value in row.items() if isinstance(value, str)} for row in rows]
