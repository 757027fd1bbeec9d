"""Every method on the demo's rows, each at a learning rate found for it, over three seeds, with `afina compare`.

python benchmarks/methods.py [--rows 1600] [--tune-rows 800] [--seeds 3]

SmolLM2-135M, the sarcastic headlines, 16 rows an update. First learning rates are tried on 800 rows with seed 0: the
method's own and three times it, then on beyond the edge while the edge is best; the same held-out rows judge the tries
and the table's first seed. Then each method trains on all rows at that rate, with every seed (run.seed and method.seed:
the rows held out, their order and the start of what is trained). Hours on 2 cores; resumes where it was interrupted
(runs/methods-*). Writes methods.md, methods.png (means, with the spread over seeds) and methods.csv (every run) beside
this file.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launch import table
from launch.compare import report as comparison
from launch.report.ranking import spread
from launch.table import Column, Record
from trainer.config import METRICS
from trainer.config.messages import in_grammar

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RATE = "optim.learning_rate"
NUMBERS = (*(key for key in comparison.COLUMNS if key not in ("method", "status")), *METRICS)
SCORES = ("eval_loss", *METRICS)
COLUMNS = {
    **{key: column for key, column in comparison.COLUMNS.items() if key != "status"},
    "trainable_parameters": Column("trainable_parameters", "trained", ",.0f"),
    **{key: Column(key, key) for key in METRICS},
    "seeds": Column("seeds", "seeds"),
}


def main() -> None:
    """Compare with each seed, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1600)
    parser.add_argument("--tune-rows", type=int, default=800, help="rows on which a learning rate is tried")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--to", type=Path, default=HERE, help="folder of the table")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of the comparisons")
    parser.add_argument("overrides", nargs="*", help="of `afina compare`, to try it: debug=tiny compare.methods=…")
    asked = parser.parse_args()
    if asked.overrides and asked.to == HERE:
        parser.error("with overrides it is another measurement: --to FOLDER")
    common = ["experiment=demo", f"compare.rows={asked.rows}"]
    tune = ["compare.tune=[1,3]", f"compare.tune_rows={asked.tune_rows}"]
    runs = compare(asked.runs, 0, [*common, *tune, *asked.overrides])
    methods = [run for run in runs if run["status"] == "finished"]
    for seed in range(1, asked.seeds):
        fixed = [f"{run['method']} {RATE}={run['learning_rate']!r}" for run in methods]
        runs += compare(asked.runs, seed, [*common, *asked.overrides, f"compare.methods={in_grammar(fixed)}"])
    write(asked.to, runs, introduction(asked.rows, asked.tune_rows, asked.seeds))


def compare(folder: Path, seed: int, overrides: Sequence[str]) -> list[Record]:
    """Run a comparison with a seed; return its records, each with that seed."""
    name = f"methods-seed{seed}"
    seeds = [f"run.seed={seed}", f"method.seed={seed}", f"run.dir={folder}", f"run.name={name}"]
    command = [sys.executable, "-m", "trainer.cli", "compare", *overrides, *seeds]
    environment = {**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, check=True, env=environment)
    with (folder / name / "compare.csv").open(newline="") as file:
        return [as_record(row, seed) for row in csv.DictReader(file)]


def as_record(row: dict[str, str], seed: int) -> Record:
    """Return a row of compare.csv as it was before it was written, under its method's name without the rate."""
    found: Record = {key: float(row[key]) if row[key] else None for key in NUMBERS if key in row}
    texts: Record = {key: row[key] for key in ("status", "folder", "error")}
    tried: Record = json.loads(row["tried"] or "{}")
    return {"method": row["method"].partition(f" {RATE}=")[0], "seed": seed, **found, **texts, "tried": tried}


def write(folder: Path, runs: Sequence[Record], words: str) -> None:
    """Write every run as CSV, the means over seeds as Markdown behind some words, and the picture with their spread."""
    methods = over_seeds(runs)
    metric = comparison.drawn_metric(methods)
    spreads = {m["method"]: m[f"{metric}_spread"] for m in methods if m[f"{metric}_spread"] is not None}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "methods.csv").write_text(table.to_csv(runs), newline="")
    comparison.draw(folder / "methods.png", methods, spreads)
    scores = [score for score in SCORES if score in methods[0]]
    shown = [m | {score: with_spread(m[score], m[f"{score}_spread"]) for score in scores} for m in methods]
    columns = [COLUMNS[key] for key in shown[0] if key in COLUMNS]
    tries = [
        f"- {run['method']}, eval loss of tries: {comparison.tries_text(run['tried'])}" for run in runs if run["tried"]
    ]
    notes = [f"- {run['method']}, seed {run['seed']}: {run['error']}" for run in runs if run["error"]]
    text = [words, "", table.markdown(*table.cells(shown, columns)), "", *tries, *notes]
    (folder / "methods.md").write_text("\n".join(text).rstrip() + "\n")


def over_seeds(runs: Sequence[Record]) -> list[Record]:
    """Return a record a method: its figures' means over its finished runs, and of each score the standard deviation
    (``SCORE_spread``), which one run alone does not have."""
    found = []
    for method in dict.fromkeys(run["method"] for run in runs):
        done = [run for run in runs if run["method"] == method and run["status"] in ("finished", "base")]
        numbers = [key for key in NUMBERS if key in runs[0]]
        spreads = {key: spread([run[key] for run in done]) for key in numbers}
        record: Record = {"method": method, **{key: each.mean if each else None for key, each in spreads.items()}}
        for score in (key for key in SCORES if key in spreads):
            each = spreads[score]
            record[f"{score}_spread"] = each.deviation if each else None
        found.append(record | {"seeds": len(done)})
    return found


def with_spread(mean: float | None, deviation: float | None) -> str | None:
    """Return a score as people read it."""
    if mean is None or deviation is None:
        return None if mean is None else f"{mean:.4f}"
    return f"{mean:.4f} ± {deviation:.4f}"


def introduction(rows: int, tune_rows: int, seeds: int) -> str:
    """Return what stands above the table."""
    return (
        f"SmolLM2-135M in bf16 on {os.cpu_count()} CPU cores; {rows} headlines seen once, 16 an update, scored on 256 "
        f"held-out rows; each method at the best of its tries on {tune_rows} rows, which stand below. Means over "
        f"{seeds} seeds (of the rows held out, their order, and the start of what is trained); ±: standard deviation."
    )


if __name__ == "__main__":
    main()
