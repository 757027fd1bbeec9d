"""List what is in a folder of runs: each run and sweep, how it stands, its score, its size, and how to go on."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.report.log_file import LogFile
from launch.report.next_steps import going_on
from launch.report.ranking import choose_metric, sortable
from launch.report.runs import SCORES, Run, as_map, number, status_of
from launch.slurm.submit import read_job
from trainer.errors import CheckpointError
from trainer.files import find_owner, parse_json
from trainer.tracking.files import CONFIG_FILE, METRICS_FILE, RUN_FILES, Record, read_summary

TAIL_BYTES = 64_000
MAX_CONFIG_BYTES = 1_000_000
SWEEP_FILES = ("sweep.csv", "compare.csv")
# What a list shows of a run that names no best metric: what was asked of it, before what it was trained by.
METRICS = (*(name for name in SCORES if name not in ("eval_loss", "train_loss", "eval_perplexity")), "eval_loss")


@dataclass(frozen=True, slots=True)
class Entry:
    """Hold a row of the list.

    Attributes:
        folder: of the run or sweep.
        kind: ``run``, ``sweep``, ``comparison``, or ``broken``: it cannot be read.
        status: of a run as in :class:`~launch.report.runs.Run`; of a sweep how many of its runs are finished.
        step: the last one that is logged; of ``total_steps``, where these are known.
        runs: how many there are; 1 of a run.
        metric: what the score is of.
        score, score_before: at the end or so far, and before training; of a sweep those of its best finished run.
        size_bytes: of all its files.
        modified: when one of its records was written last, in seconds since 1970.
        next: the command that goes on.
        reason: why it cannot be read, or why it failed.
    """

    folder: Path
    kind: str
    status: str
    step: int | None = None
    total_steps: int | None = None
    runs: int = 1
    metric: str | None = None
    score: float | None = None
    score_before: float | None = None
    size_bytes: int = 0
    modified: float | None = None
    next: str | None = None
    reason: str | None = None


def list_runs(folder: Path) -> list[Entry]:
    """List the runs and sweeps in a folder, those that were written to last on top; a broken one is listed as that."""
    inside = [each for each in sorted(folder.iterdir()) if not each.name.startswith(".")]
    found = [entry for each in inside if (entry := _list_one(each)) is not None]
    return sorted(found, key=lambda entry: entry.modified or 0.0, reverse=True)


def _list_one(folder: Path) -> Entry | None:
    """List a folder; ``None`` where nothing in it is of a run."""
    try:
        if not folder.is_dir():
            return None
        if _is_run(folder):
            return _entry_of_run(peek(folder))
        trials = [each for each in sorted(folder.iterdir()) if each.is_dir() and _is_run(each)]
        if trials or any((folder / name).is_file() for name in SWEEP_FILES):
            return _entry_of_sweep(folder, trials)
        return None
    except (CheckpointError, OSError) as error:
        reason = error.reason if isinstance(error, CheckpointError) else error.strerror or str(error)
        what = f"{Path(error.what).name} " if isinstance(error, CheckpointError) else ""
        return Entry(
            folder, "broken", "broken", size_bytes=_size(folder), modified=_modified(folder), reason=what + reason
        )


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in RUN_FILES) or read_job(folder) is not None


def peek(folder: Path) -> Run:
    """Read as much of a run as a list shows: of its metrics and log the first line and the last ones.

    Raises:
        CheckpointError: one of its files is not what it must be.
        OSError: one cannot be read.
    """
    config = _read_config(folder / CONFIG_FILE)
    summary = read_summary(folder) or {}
    metrics = _ends_of_metrics(folder / METRICS_FILE)
    log = LogFile(total_steps=_total_steps(folder / "log.txt"))
    status = status_of(find_owner(folder), summary, bool(metrics or log.total_steps))
    error = as_map(summary.get("error")).get("message")
    return Run(folder.name, folder, status, None if error is None else str(error), config, summary, metrics, log)


def _read_config(file: Path) -> dict[str, Any]:
    """Read the keys of a config, just as they stand there: in a tenth of the time of ``read_values``.

    Raises:
        CheckpointError: it is none.
    """
    if not file.exists():
        return {}
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with file.open("rb") as opened:
        content = opened.read(MAX_CONFIG_BYTES + 1)
    try:
        found = yaml.load(content, loader) if len(content) <= MAX_CONFIG_BYTES else None
    except (yaml.YAMLError, ValueError, RecursionError):
        found = None
    if not isinstance(found, Mapping):
        raise CheckpointError(str(file), reason="cannot be read as YAML")
    sections = ((name, body) for name, body in found.items() if isinstance(body, Mapping))
    return {f"{section}.{key}": value for section, body in sections for key, value in body.items()}


def _ends_of_metrics(file: Path) -> list[Record]:
    """Read the first record of a `metrics.jsonl`, which has the scores before training, and the last ones."""
    first, tail = _ends(file)
    found = []
    for line in dict.fromkeys([first, *tail]):
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            found.append(record)
    if first and not found:
        raise CheckpointError(str(file), reason="holds no record of a step")
    return found


def _total_steps(file: Path) -> int | None:
    """Return how many steps a run was to take, as its log said last."""
    found = re.findall(rb"(?m) step \d+/(\d+)\b", b"\n".join(_ends(file)[1]))
    return int(found[-1]) if found else None


def _ends(file: Path) -> tuple[bytes, list[bytes]]:
    """Return the first line of a file and its last complete ones; empty where there is no file."""
    try:
        with file.open("rb") as opened:
            first = opened.readline(TAIL_BYTES)
            start = max(0, opened.seek(0, os.SEEK_END) - TAIL_BYTES)
            opened.seek(start)
            lines = opened.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return b"", []
    return first.rstrip(b"\n"), lines[1:] if start else lines


def _entry_of_run(run: Run) -> Entry:
    assert run.folder is not None
    metric = _metric_of(run)
    return Entry(
        run.folder,
        "run",
        run.status,
        run.steps,
        run.log.total_steps,
        metric=metric,
        score=None if metric is None else run.score(metric),
        score_before=None if metric is None else run.score_before(metric),
        size_bytes=_size(run.folder),
        modified=_modified(run.folder),
        next=going_on(run),
        reason=run.error,
    )


def _metric_of(run: Run) -> str | None:
    candidates = [run.config.get("eval.best_metric"), *METRICS, "train_loss"]
    return next((name for name in candidates if name in SCORES and run.score(name) is not None), None)


def _entry_of_sweep(folder: Path, trials: list[Path]) -> Entry:
    runs, reasons = [], []
    for trial in trials:
        try:
            runs.append(peek(trial))
        except (CheckpointError, OSError):
            reasons.append(f"{trial.name} cannot be read")
    finished = [run for run in runs if run.is_finished]
    best_metrics = {_own_metric(run) for run in finished}
    metric = choose_metric([{name: run.score(name) for name in SCORES} for run in finished], best_metrics)
    best = min(finished, key=lambda run: sortable(run.score(metric), metric), default=None)
    statuses = Counter(run.status for run in runs)
    others = [f"{count} {status}" for status, count in statuses.items() if status != "finished"]
    kind = "comparison" if (folder / "compare.csv").is_file() else "sweep"
    return Entry(
        folder,
        kind,
        ", ".join([f"{len(finished)} of {len(trials)} finished", *others]),
        runs=len(trials),
        metric=metric if best else None,
        score=best.score(metric) if best else None,
        score_before=best.score_before(metric) if best else None,
        size_bytes=_size(folder),
        modified=max([_modified(each) or 0.0 for each in [folder, *trials]]) or None,
        next=going_on(Run(folder.name, folder, kind)) if runs else None,
        reason="; ".join(reasons) or None,
    )


def _own_metric(run: Run) -> str | None:
    found = run.config.get("eval.best_metric")
    return found if found in SCORES else None


def _size(folder: Path) -> int:
    return sum(_sizes(folder))


def _sizes(folder: Path) -> Iterator[int]:
    """Yield the sizes of all files below, links not followed; what cannot be looked at, or has just gone, is none."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield from _sizes(Path(entry.path))
                else:
                    yield entry.stat(follow_symlinks=False).st_size
    except OSError:
        return


def _modified(folder: Path) -> float | None:
    """Return when a record of a run was written last: a report that was made of it later does not count."""
    times = []
    for name in (*RUN_FILES, "log.txt", *SWEEP_FILES):
        try:
            times.append((folder / name).stat().st_mtime)
        except OSError:
            continue
    return max(times, default=None)


def record(entry: Entry) -> dict[str, Any]:
    """Return an entry as `afina runs --json` prints it: raw values."""
    return {
        "name": entry.folder.name,
        "folder": str(entry.folder),
        "kind": entry.kind,
        "status": entry.status,
        "step": entry.step,
        "total_steps": entry.total_steps,
        "runs": entry.runs,
        "metric": entry.metric,
        "score": number(entry.score),
        "score_before": number(entry.score_before),
        "size_bytes": entry.size_bytes,
        "modified": entry.modified,
        "next": entry.next,
        "reason": entry.reason,
    }
