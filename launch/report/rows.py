"""Build the rows of a report: raw numbers for the CSV, and cells as people read them, with the spread over seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launch.report.gather import Report
from launch.report.ranking import SEEDS, Setting, short_labels, spread
from launch.report.runs import Run, cost, number, parameters, saved_bytes
from launch.report.values import MISSING, show
from launch.table import Column, Record
from trainer.html import visible

GIB, MIB = 2**30, 2**20
COSTS = (
    Column("trainable_parameters", "trained", ","),
    Column("trainable_percent", "share", ".2f", " %"),
    Column("saved_bytes", "saved", ",.1f", " MiB", MIB),
    Column("peak_memory_bytes", "peak memory", ".2f", " GiB", GIB),
    Column("useful_tokens_per_second", "useful tok/s", ",.0f"),
    Column("seconds", "seconds", ",.0f"),
)


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table: its text, and what it is sorted by (``None`` comes last)."""

    text: str
    value: float | str | None = None

    @property
    def is_number(self) -> bool:
        return not isinstance(self.value, str) and self.value is not None


def record(run: Run, report: Report) -> Record:
    """Return the raw values of a run, the same keys for every run of a report; ``None`` is what it does not have."""
    place = next((setting.rank for setting in report.settings if any(run is each for each in setting.runs)), None)
    keys = dict.fromkeys([*report.axes, *(key for key in SEEDS if key in report.varied)])
    if report.kind == "comparison":
        keys = dict.fromkeys(["optim.learning_rate"])
    return {
        "rank": place if run.is_finished else None,
        "run": run.name,
        **{key: run.config.get(key) for key in keys},
        "status": run.status,
        "steps": run.steps,
        **parameters(run.summary),
        "saved_bytes": (saved_bytes(run.folder) or None) if run.folder else None,
        **cost(run.metrics),
        "seconds": run.seconds,
        **{name: run.score(name) for name in report.scores},
        **{f"{name}_before": run.score_before(name) for name in report.scores},
        "folder": str(run.folder) if run.folder else None,
        "error": run.error,
    }


def records(report: Report) -> list[Record]:
    """Return a record a run, in the order of the report."""
    return [record(run, report) for run in report.runs]


def table(report: Report) -> tuple[list[str], list[list[Cell]]]:
    """Return header and rows of the ranked table: a row a setting, its figures the mean over its finished runs."""
    if report.kind == "run":
        return _figures(report)
    found = {id(run): record(run, report) for run in report.runs}
    columns = [Column(name, name.replace("_", " "), ".4f") for name in report.scores]
    columns += [column for column in COSTS if _is_worth_a_column(column, list(found.values()), report)]
    labels = short_labels(report.axes)
    if report.kind == "comparison":
        labels = {"run": "method", "optim.learning_rate": "learning rate"}
    elif not labels:
        labels = {"run": "run"}
    header = [
        "#",
        *labels.values(),
        *([report.repeats] if report.has_repeats else []),
        *(c.head for c in columns),
        "status",
    ]
    rows = []
    for setting in report.settings:
        first = found[id(setting.runs[0])]
        row = [Cell(MISSING if setting.rank is None else str(setting.rank), setting.rank)]
        row += [_value_cell(first["run"] if key == "run" else setting.runs[0].config.get(key)) for key in labels]
        if report.has_repeats:
            row.append(Cell(str(len(setting.runs)), len(setting.runs)))
        row += [
            _spread_cell(column, [found[id(run)] for run in setting.finished or setting.runs]) for column in columns
        ]
        rows.append([*row, Cell(_status(setting), _status(setting))])
    return header, rows


def _figures(report: Report) -> tuple[list[str], list[list[Cell]]]:
    """Return the figures of a single run, a row each."""
    run = report.runs[0]
    found = record(run, report)
    lines = []
    for name in report.scores:
        before, after = found[f"{name}_before"], found[name]
        lines.append([_value_cell(name), Cell(score_text(before), before), Cell(score_text(after), after)])
    for column in (Column("steps", "steps", ","), *COSTS):
        if found[column.key] is not None:
            lines.append([_value_cell(column.head), Cell(MISSING), Cell(column.cell(found), found[column.key])])
    lines.append([_value_cell("status"), Cell(MISSING), _value_cell(run.status)])
    return ["figure", "before training", "at the end" if run.is_finished else "so far"], lines


def _is_worth_a_column(column: Column, found: list[Record], report: Report) -> bool:
    values = {each[column.key] for each in found}
    if column.key in ("trainable_percent", "saved_bytes"):
        return report.kind == "comparison" and values != {None}
    return values != {None}


def _value_cell(value: Any) -> Cell:
    text = MISSING if value is None else visible(show(value))
    return Cell(text, number(value) if number(value) is not None else text)


def _spread_cell(column: Column, found: list[Record]) -> Cell:
    """Return a figure of the runs of a setting: one number, or mean ± standard deviation where they differ."""
    values = [each[column.key] for each in found]
    if len(set(values)) == 1:
        return Cell(MISSING if values[0] is None else column.cell({column.key: values[0]}), values[0])
    all_of_them = spread(values)
    if all_of_them is None or all_of_them.deviation is None:
        return Cell(MISSING)
    mean = Column("", "", column.form, "", column.divisor).cell({"": all_of_them.mean})
    return Cell(f"{mean} ± {column.cell({column.key: all_of_them.deviation})}", all_of_them.mean)


def _status(setting: Setting) -> str:
    statuses = [run.status for run in setting.runs]
    if len(set(statuses)) == 1:
        return visible(statuses[0])
    return ", ".join(f"{statuses.count(each)} {visible(each)}" for each in dict.fromkeys(statuses))


def score_text(value: float | None) -> str:
    """Return a score with the four digits that the tables have."""
    return MISSING if value is None else f"{value:.4f}"
