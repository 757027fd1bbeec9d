"""What a comparison found: a table on the terminal, as `compare.csv` and `compare.md`, and a picture, `compare.png`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import table
from launch.process import read_summary
from trainer.config import METRICS

if TYPE_CHECKING:
    from launch.compare.candidates import Candidate

Record = dict[str, Any]
BASE = "no training"
HEADS = {
    "method": "method",
    "learning_rate": "learning rate",
    "trainable_parameters": "trained",
    "trainable_percent": "share",
    "adapter_bytes": "saved",
    "peak_memory_bytes": "peak memory",
    "seconds": "seconds",
    "useful_tokens_per_second": "useful tok/s",
    "eval_loss": "eval loss",
    "status": "status",
}
GIB, MIB = 2**30, 2**20


def collect(candidates: Sequence[Candidate]) -> list[Record]:
    """One record a method in the order given, after one of the base model where it was scored.

    Returns:
        Records with the same keys: those of ``HEADS``, every metric that any run has, ``tried`` (loss by learning
        rate), folder, error. ``None`` is what a method does not have. ``peak_memory_bytes`` is that of rank 0's process
        (on a GPU: of its device), ``seconds`` the whole run's (of one that was interrupted: since it went on),
        ``useful_tokens_per_second`` that of its steps.
    """
    summaries = [read_summary(candidate.trial.folder) if candidate.trial else {} for candidate in candidates]
    scores: list[Record] = [summary.get("metrics") or {} for summary in summaries]
    seen = {name.removesuffix("_before") for metrics in scores for name in metrics}
    names = ["eval_loss", *(name for name in METRICS if name in seen)]
    records = [_record(candidate, summary, names) for candidate, summary in zip(candidates, summaries, strict=True)]
    before = [{name: metrics.get(f"{name}_before") for name in names} for metrics in scores]
    if base := next((found for found in before if any(value is not None for value in found.values())), None):
        records.insert(0, dict.fromkeys(records[0]) | {"method": BASE, **base, "status": "base"})
    return records


def _record(candidate: Candidate, summary: Record, names: Sequence[str]) -> Record:
    folder = candidate.trial.folder if candidate.trial else None
    done = summary.get("status") == "finished" and not candidate.error
    trained, total = summary.get("trainable_parameters"), summary.get("total_parameters")
    return {
        "method": candidate.name,
        "learning_rate": candidate.rate if candidate.trial else None,
        "trainable_parameters": trained,
        "trainable_percent": 100 * trained / total if trained and total else None,
        "adapter_bytes": _saved_bytes(folder) if folder and done else None,
        **(_cost(folder) if folder and done else dict.fromkeys(("peak_memory_bytes", "useful_tokens_per_second"))),
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


def _saved_bytes(folder: Path) -> int:
    """Of the weights that a run ended with: an adapter's, or the whole model's."""
    return sum(file.stat().st_size for name in ("adapter", "model") for file in (folder / name).glob("*.safetensors"))


def _cost(folder: Path) -> dict[str, float | None]:
    """Of the logged steps."""
    steps = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "step_seconds" in record:
            steps.append(record)
    seconds = sum(step["step_seconds"] for step in steps)
    return {
        "peak_memory_bytes": max((step["peak_memory_bytes"] for step in steps), default=None),
        "useful_tokens_per_second": sum(step["useful_tokens"] for step in steps) / seconds if seconds else None,
    }


def write(folder: Path, records: Sequence[Record]) -> None:
    """Write `compare.csv` (raw numbers), `compare.md` (the table as people read it), `compare.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    table.write_csv(folder / "compare.csv", [{**r, "tried": json.dumps(r["tried"] or {})} for r in records])
    text = table.markdown(*_cells(records))
    notes = [f"- {record['method']}: {record['error']}" for record in records if record["error"]]
    notes += [f"- {r['method']}, eval loss of tries: {_tries(r['tried'])}" for r in records if r["tried"]]
    (folder / "compare.md").write_text("\n".join([text, *([""] + notes if notes else [])]) + "\n")
    draw(folder / "compare.png", records)


def _tries(tried: dict[str, float | None]) -> str:
    return ", ".join(f"{rate} → {'failed' if loss is None else f'{loss:.4f}'}" for rate, loss in tried.items())


def show(records: Sequence[Record]) -> None:
    """Print the table on stdout; below it, why methods are missing."""
    header, rows = _cells(records)
    colours = {"failed": "red", "refused": "yellow", "base": "dim"}
    table.show(header, rows, [colours.get(record["status"]) for record in records])
    for record in records:
        if record["error"]:
            print(f"{record['method']}: {record['error']}")


def _cells(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    keys = [key for key in records[0] if key not in ("tried", "folder", "error")]
    return [HEADS.get(key, key) for key in keys], [[_cell(key, record[key]) for key in keys] for record in records]


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    forms = {
        "learning_rate": lambda v: f"{v:g}",
        "trainable_parameters": lambda v: f"{v:,}",
        "trainable_percent": lambda v: f"{v:.2f} %",
        "adapter_bytes": lambda v: f"{v / MIB:,.1f} MiB",
        "peak_memory_bytes": lambda v: f"{v / GIB:.2f} GiB",
        "seconds": lambda v: f"{v:.0f}",
        "useful_tokens_per_second": lambda v: f"{v:.0f}",
    }
    return forms.get(key, lambda v: f"{v:.4f}" if isinstance(v, float) else str(v))(value)


def draw(picture: Path, records: Sequence[Record]) -> None:
    """Quality against peak memory, a point a method: the last metric of the table, or the eval loss where there is
    none. Without two finished methods there is nothing to compare, and no picture."""
    metric = next((m for m in reversed(METRICS) if any(r.get(m) is not None for r in records)), "eval_loss")
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
    base = next((r[metric] for r in records if r["method"] == BASE), None)
    if base is not None:  # told, not drawn: it is so far off that the methods would lie on each other
        axes.set_title(f"{BASE}: {base:.4g}", loc="left", fontsize=10, color="0.4")
    if metric == "eval_loss":
        axes.invert_yaxis()  # better is above, whatever the metric
    axes.set(xlabel="peak memory (GiB)", ylabel=metric.replace("_", " "))
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(picture, dpi=120, metadata={"Software": None})
    plt.close(figure)
