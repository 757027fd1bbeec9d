"""Every method on the demo's rows, each at a learning rate found for it, with `afina compare`.

python benchmarks/methods.py [--rows 1600]

SmolLM2-135M, the sarcastic headlines, 16 rows an update. First learning rates are tried on 320 rows: the method's own
and three times it, then on beyond the edge while the edge is best; the same held-out rows judge the tries and the
table. Then each method trains once on all rows. Goes on where it was interrupted (runs/methods). Writes methods.md,
methods.csv and methods.png beside this file.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NAME = "methods"


def main() -> None:
    """Compare, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1600)
    rows = parser.parse_args().rows
    keys = ["experiment=demo", f"compare.rows={rows}", "compare.tune=[1,3]", f"run.name={NAME}", "run.dir=runs"]
    command = [sys.executable, "-c", "import sys; from trainer.cli import main; sys.exit(main())", "compare", *keys]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "WANDB_MODE": "offline"})
    folder = ROOT / "runs" / NAME
    for kind in ("csv", "png"):
        shutil.copyfile(folder / f"compare.{kind}", HERE / f"{NAME}.{kind}")
    (HERE / f"{NAME}.md").write_text(table(folder / "compare.csv", rows))


def table(file: Path, rows: int) -> str:
    """The table as Markdown, with what it was measured on above and the tries below."""
    with file.open() as lines:
        records = list(csv.DictReader(lines))
    head = (
        f"SmolLM2-135M in bf16 on 2 CPU cores; {rows} headlines seen once, 16 an update, 400 held out; "
        "each method at the best of the learning rates below.\n\n"
        "| method | learning rate | trained | share | saved | peak memory | seconds | useful tok/s | eval loss "
        "| exact match |"
    )
    lines = [head, "|---" * 10 + "|"]
    for r in records:
        if r["status"] == "base":
            lines.append(f"| {r['method']} | | | | | | | | {float(r['eval_loss']):.4f} | {share(r['exact_match'])} |")
            continue
        lines.append(
            f"| {r['method']} | {float(r['learning_rate']):g} | {int(r['trainable_parameters']):,} "
            f"| {float(r['trainable_percent']):.2f} % | {int(r['adapter_bytes']) / 2**20:,.1f} MiB "
            f"| {int(r['peak_memory_bytes']) / 2**30:.2f} GiB | {float(r['seconds']):.0f} "
            f"| {float(r['useful_tokens_per_second']):.0f} | {float(r['eval_loss']):.4f} | {share(r['exact_match'])} |"
        )
    lines += ["", "Eval loss of the tries, 20 updates each:", "", "| method | learning rate → eval loss |", "|---|---|"]
    for r in records:
        if r["tried"]:
            tries = ", ".join(
                f"{k} → {'diverged' if v is None else f'{v:.3f}'}" for k, v in json.loads(r["tried"]).items()
            )
            lines.append(f"| {r['method']} | {tries} |")
    return "\n".join(lines) + "\n"


def share(value: str) -> str:
    """A share as per cent."""
    return f"{100 * float(value):.1f} %"


if __name__ == "__main__":
    main()
