"""Build a comparison's table (on the terminal, `compare.csv`, `compare.md`) and its picture, `compare.png`."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from launch import table
from launch.report.rows import COSTS, GIB
from launch.report.runs import cost, parameters, saved_bytes
from launch.report.write import end_with_page
from launch.table import Column, Record
from trainer.config import METRICS
from trainer.files import write_atomically
from trainer.tracking.files import find_summary, read_metrics

if TYPE_CHECKING:
    from launch.compare.candidates import Candidate

BASE = "no training"
COLUMNS = {
    column.key: column
    for column in (
        Column("method", "method"),
        Column("learning_rate", "learning rate", "g"),
        *(replace(each, key="adapter_bytes") if each.key == "saved_bytes" else each for each in COSTS),
        Column("eval_loss", "eval loss", ".4f"),
        Column("status", "status"),
    )
}


def collect(candidates: Sequence[Candidate]) -> list[Record]:
    """Collect one record a method, in the order given, after one of the base model where it was scored.

    Returns:
        Records with the same keys: those of ``COLUMNS``, every metric that any run has, ``tried`` (loss by learning
        rate), folder, error. ``None`` is what a method does not have. ``peak_memory_bytes`` is that of rank 0's process
        (on a GPU: of its device), ``seconds`` the whole run's (of one that was interrupted: since it was resumed),
        ``useful_tokens_per_second`` that of its steps.
    """
    summaries = [find_summary(candidate.trial.folder) if candidate.trial else {} for candidate in candidates]
    scores: list[Record] = [summary.get("metrics") or {} for summary in summaries]
    seen = {name.removesuffix("_before") for metrics in scores for name in metrics}
    names = ["eval_loss", *(name for name in METRICS if name in seen)]
    records = [_record(candidate, summary, names) for candidate, summary in zip(candidates, summaries, strict=True)]
    before = [{name: metrics.get(f"{name}_before") for name in names} for metrics in scores]
    if base := next((found for found in before if any(value is not None for value in found.values())), None):
        records.insert(0, dict.fromkeys(records[0]) | {"method": BASE, **base, "status": "base", "tried": {}})
    return records


def _record(candidate: Candidate, summary: Record, names: Sequence[str]) -> Record:
    folder = candidate.trial.folder if candidate.trial else None
    done = summary.get("status") == "finished" and not candidate.error
    return {
        "method": candidate.name,
        "learning_rate": candidate.rate if candidate.trial else None,
        **parameters(summary),
        "adapter_bytes": saved_bytes(folder) if folder and done else None,
        **(
            cost(read_metrics(folder))
            if folder and done
            else dict.fromkeys(("peak_memory_bytes", "useful_tokens_per_second"))
        ),
        "seconds": summary.get("wall_seconds"),
        **{name: summary["metrics"].get(name) if done else None for name in names},
        "status": "refused"
        if candidate.refused
        else "failed"
        if candidate.error
        else summary.get("status") or "not run",
        "tried": {f"{rate:g}": None if math.isinf(loss) else loss for rate, loss in sorted(candidate.tried.items())},
        "folder": str(folder) if folder else None,
        "error": candidate.refused or candidate.error,
    }


def write(folder: Path, records: Sequence[Record]) -> None:
    """Write `compare.csv` (raw numbers), `compare.md` (the table as people read it), `compare.png`."""
    notes = [f"{record['method']}: {record['error']}" for record in records if record["error"]]
    notes += [f"{r['method']}, eval loss of tries: {tries_text(r['tried'])}" for r in records if r["tried"]]
    table.write(folder / "compare", records, columns(records), notes)
    draw(folder / "compare.png", records)


def tries_text(tried: Mapping[str, float | None]) -> str:
    """Return the losses of learning rates as people read them."""
    return ", ".join(f"{rate} → {'failed' if loss is None else f'{loss:.4f}'}" for rate, loss in tried.items())


def show(records: Sequence[Record]) -> None:
    """Print the table on stdout; below it, why methods are missing."""
    colours = {"failed": "red", "refused": "yellow", "base": "dim"}
    table.show_records(records, columns(records), lambda record: colours.get(record["status"]))
    for record in records:
        if record["error"]:
            print(f"{record['method']}: {record['error']}")


def write_page(folder: Path) -> None:
    """Write `report.html` beside the table, and log which files there are."""
    end_with_page(folder, [folder / f"compare.{kind}" for kind in ("csv", "md", "png")])


def columns(records: Sequence[Record]) -> list[Column]:
    """Choose the columns: those of ``COLUMNS``, and every metric that any run has."""
    keys = [key for key in records[0] if key not in ("tried", "folder", "error")]
    return [COLUMNS.get(key, Column(key, key, ".4f")) for key in keys]


def drawn_metric(records: Sequence[Record]) -> str:
    """Return the metric that is drawn: the last one of the table, or the eval loss where there is none."""
    return next((m for m in reversed(METRICS) if any(r.get(m) is not None for r in records)), "eval_loss")


def draw(picture: Path, records: Sequence[Record], spreads: Mapping[str, float] = MappingProxyType({})) -> None:
    """Draw quality against peak memory, a point a method. Without two finished methods there is nothing to compare, and
    no picture.

    Args:
        picture: the PNG that is written.
        records: of :func:`collect`.
        spreads: of the metric by method, where it has one: half the length of an error bar.
    """
    metric = drawn_metric(records)
    trained = [r for r in records if r["peak_memory_bytes"] and r[metric] is not None]
    if len(trained) < 2:
        return
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    colours = plt.get_cmap("tab20")
    for number, record in enumerate(trained):
        x, y = record["peak_memory_bytes"] / GIB, record[metric]
        look: Record = {"marker": "osD^v"[number % 5], "color": colours(number / 20), "edgecolor": "0.25"}
        axes.scatter([x], [y], s=70, label=record["method"], zorder=3, **look)
        if record["method"] in spreads:
            axes.errorbar([x], [y], yerr=[spreads[record["method"]]], color="0.4", capsize=3, linewidth=1, zorder=2)
    base = next((r[metric] for r in records if r["method"] == BASE), None)
    if base is not None:  # written, not drawn: it is so far off that the methods would lie on each other
        axes.set_title(f"{BASE}: {base:.4g}", loc="left", fontsize=10, color="0.4")
    if metric == "eval_loss":
        axes.invert_yaxis()  # better is above, whatever the metric
    axes.set(xlabel="peak memory (GiB)", ylabel=metric.replace("_", " "))
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120, metadata={"Software": None})
    plt.close(figure)
    write_atomically(picture, drawn.getvalue())
