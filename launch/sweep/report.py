"""Build the table at the end of a sweep: best run first, on the terminal and as `sweep.csv` and `sweep.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import table
from launch.report.ranking import choose_metric, short_labels, sortable
from launch.report.runs import SCORES, with_method_defaults
from launch.report.together import group_of, sentences
from launch.report.write import end_with_page
from launch.table import Record
from trainer.tracking.files import find_summary

if TYPE_CHECKING:
    from launch.trials import Trial

OTHER_METRICS = tuple(name for name in SCORES if name not in ("eval_loss", "train_loss"))
# `rank` is the config group that sets the other two; its name is also that of our first column
RANK_AND_ALPHA = ("method.r", "method.alpha", "rank")


def rank(
    trials: Sequence[Trial],
    errors: Mapping[str, str],
    metric: str | None = None,
    notes: Mapping[str, str] | None = None,
) -> list[Record]:
    """Rank the trials, best first: by `sweep.metric`; without one by their own `eval.best_metric`, by the lowest
    `eval_loss`, or `train_loss` where a finished run has no `eval_loss`.

    Args:
        trials: all trials of the sweep.
        errors: why a trial failed, by its name.
        metric: `sweep.metric`.
        notes: what stands for the status of one that was stopped early, by its name.

    Returns:
        One record a trial, with the same keys in the same order: rank, the varied keys, trainable_parameters, the
        losses, the other metrics that any run has, seconds, status, the group that it was trained in where any was,
        folder, error. `None` is what a run does not have.
    """
    records = [_record(trial, errors.get(trial.name), (notes or {}).get(trial.name)) for trial in trials]
    finished = [record for record in records if record["status"] == "finished"]
    by = choose_metric(finished, {trial.config.eval.best_metric for trial in trials}, metric)
    finished.sort(key=lambda record: sortable(record[by], by))
    for place, record in enumerate(finished, 1):
        record["rank"] = place
    unused = [name for name in (*OTHER_METRICS, "together") if all(record[name] is None for record in records)]
    if by != "eval_perplexity":  # orders as eval_loss does
        unused.append("eval_perplexity")
    for record, name in product(records, set(unused)):
        del record[name]
    return finished + [record for record in records if record["status"] != "finished"]


def _record(trial: Trial, error: str | None, note: str | None) -> Record:
    summary = find_summary(trial.folder)
    metrics = summary.get("metrics") or {}
    record: Record = {"rank": None, **_varied_values(trial)}
    record["trainable_parameters"] = summary.get("trainable_parameters")
    record["eval_loss"] = metrics.get("eval_loss")
    record["train_loss"] = summary.get("train_loss")
    record |= {name: metrics.get(name) for name in OTHER_METRICS}
    record["seconds"] = summary.get("wall_seconds")
    # this sweep's word counts before that of a summary left by an earlier one
    record["status"] = "failed" if error else note or summary.get("status") or "not run"
    record["together"] = group_of(summary)
    record["folder"] = str(trial.folder)
    record["error"] = error or (summary.get("error") or {}).get("message")
    return record


def _varied_values(trial: Trial) -> dict[str, Any]:
    """Return the varied keys; rank and alpha together, since alpha follows the rank unless it is given."""
    values: dict[str, Any] = dict(trial.values)
    if not any(key in values for key in RANK_AND_ALPHA):
        return values
    method = trial.config.method
    pair = with_method_defaults({"method.r": method.r, "method.alpha": method.alpha})
    return {**pair, **{key: value for key, value in values.items() if key not in RANK_AND_ALPHA}}


def write(folder: Path, records: Sequence[Record]) -> None:
    """Write `sweep.csv` (raw numbers, whole keys) and `sweep.md` (the table as people read it)."""
    notes = [f"`{record['folder']}`: {record['error']}" for record in records if record["error"]]
    table.write(folder / "sweep", records, columns(records), [*notes, *_together(records)])


def show(records: Sequence[Record]) -> None:
    """Print the table on stdout, the best run and the failed ones coloured; below it, which were trained together."""
    colours = {"failed": "red", "finished": None}
    table.show_records(
        records, columns(records), lambda r: "bold green" if r["rank"] == 1 else colours.get(r["status"])
    )
    for sentence in _together(records):
        print(sentence)


def _together(records: Sequence[Record]) -> list[str]:
    folders = [Path(record["folder"]) for record in records]
    return sentences((folder.name, find_summary(folder)) for folder in folders)


def write_page(folder: Path) -> None:
    """Write `report.html` beside the table, and log which files there are."""
    end_with_page(folder, [folder / "sweep.csv", folder / "sweep.md"])


def columns(records: Sequence[Record]) -> list[table.Column]:
    """Choose the columns: all keys but the error, which stands below the table."""
    keys = [key for key in records[0] if key != "error"]
    labels = short_labels(keys)
    forms = {"trainable_parameters": ",", "seconds": ".1f"}
    forms |= dict.fromkeys(("eval_loss", "train_loss", *OTHER_METRICS), ".4f")
    return [table.Column(key, labels[key], forms.get(key, "")) for key in keys]
