"""Write the campaign's results as Markdown.

python -m benchmarks.gpu.report RESULTS.jsonl [--dry] [--json FILE]

Prints it, and exits with 1 where a stage failed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# NeMo Automodel's published LoRA training of Llama-3.1-8B on one H100: useful tokens a second, and its utilization,
# which counts 4 operations a frozen weight and token, as afina's does.
NEMO_TOKENS_PER_SECOND, NEMO_UTILIZATION = 12473, 0.406
LONE = "_lone"  # ends the name of the lone run that a fused group stands beside
NORM = 1e-5  # fp32: how far any way of training may be from one plain process
STEP = (
    ("median step s", "median_step_seconds", "{:.3f}"),
    ("useful tok/s", "useful_tokens_per_second", "{:.0f}"),
    ("computed tok/s", "computed_tokens_per_second", "{:.0f}"),
    ("MFU", "model_flops_utilization", "{:.1%}"),
    ("useful MFU", "useful_flops_utilization", "{:.1%}"),
    ("GiB allocated", "peak_allocated_gib", "{:.1f}"),
    ("GiB reserved", "peak_reserved_gib", "{:.1f}"),
    ("kernels in use", "kernels", "{}"),
    ("launches", "kernel_launches", "{}"),
    ("GPU busy s", "kernel_seconds", "{:.3f}"),
    ("start s", "start_seconds", "{:.0f}"),
)
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report. Returns 1 where a stage failed, else 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, metavar="RESULTS.jsonl")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU: say so at the top")
    parser.add_argument("--json", type=Path, default=None, help="write the results into this file too")
    asked = parser.parse_args(arguments)
    rows = [json.loads(line) for line in asked.results.read_text().splitlines()]
    print("\n".join(lines_of(rows, asked.dry)))
    if asked.json is not None:
        asked.json.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    return int(any(row.get("code") for row in rows if "run" not in row))


def lines_of(rows: list[Row], dry: bool) -> list[str]:
    """Return the lines of the report: the machine, what failed, correctness, small questions, speed."""
    lines = ["# afina on a GPU", ""]
    if dry:
        lines += ["Tiny shapes on a CPU, to try the scripts: the figures mean nothing.", ""]
    for row in rows:
        if row["stage"] == "env" and "what" in row:
            values = ", ".join(f"{k} {v}" for k, v in row.items() if k not in ("stage", "what") and v is not None)
            lines.append(f"- {row['what']}: {values}")
    tests = next((row.get("summary", "") for row in rows if row["stage"] == "pytest"), "not run")
    lines += [f"- tests/gpu: {tests}", *stage_lines(rows)]
    return lines + correctness_lines(rows) + micro_lines(rows) + speed_lines(rows, dry)


def stage_lines(rows: list[Row]) -> list[str]:
    """Return a line for each stage that failed or was left out."""
    lines = []
    for row in rows:
        if row.get("skipped"):
            lines.append(f"- {row['stage']}: left out, {row['skipped']}")
        elif row.get("code") and "run" not in row:
            lines.append(f"- {row['stage']}: **failed** ({row['code']}): `{row.get('tail', '')[-300:]}`")
    return lines


def correctness_lines(rows: list[Row]) -> list[str]:
    """Return the table of the tiny model's trainings."""
    runs = [row for row in rows if row["stage"] == "correct" and "run" in row]
    if not runs:
        return []
    lines = [
        *("", "## The tiny model", ""),
        f"Largest relative distance of a trained tensor; in fp32 at most {NORM:g} is promised (4 and 8 bits: 5e-05).",
        *(
            "",
            "| training | against | distance | same to the bit | seconds | kernels in use |",
            "|---|---|---|---|---|---|",
        ),
    ]
    for run in runs:
        if run["code"]:
            lines.append(f"| {run['run']} | **failed** ({run['code']}) | `{cell(run['tail'][-200:])}` | | | |")
        else:
            if "broken" in run:
                run["same_to_the_bit"] = f"**no**: {run['broken']}"
            columns = ("against", "far", "same_to_the_bit", "seconds", "kernels")
            values = (cell(run.get(name, "")) for name in columns)
            lines.append(f"| {run['run']} | {' | '.join(values)} |")
    return lines


def micro_lines(rows: list[Row]) -> list[str]:
    """Return a line for each small question."""
    found = [row for row in rows if row["stage"] == "micro" and "what" in row]
    lines = ["", "## Small questions", ""] if found else []
    for row in found:
        values = " ".join(f"{k} {cell(v)}" for k, v in row.items() if k not in ("stage", "what"))
        lines.append(f"- {row['what']}: {values}")
    return lines


def speed_lines(rows: list[Row], dry: bool) -> list[str]:
    """Return the table of the timed trainings; if not dry, those of 8B with all its layers beside NeMo Automodel's."""
    timed = [row for row in rows if "median_step_seconds" in row]
    if not timed:
        return []
    lines = [
        *("", "## Speed", ""),
        "MFU: model FLOPs of the computed tokens over the device's dense peak, as in metrics.jsonl; useful MFU: of the "
        "rows' own tokens, as if each were computed alone. What gradient checkpointing computes twice does not count.",
        *("", f"| training | {' | '.join(title for title, _, _ in STEP)} |", f"|---|{'---|' * len(STEP)}"),
    ]
    for row in timed:
        values = (form.format(row[name]) if name in row else "" for _, name, form in STEP)
        lines.append(f"| {row['stage']} | {' | '.join(values)} |")
    lines.append("")
    lines += [beside_nemo(row) for row in timed if row["stage"].startswith("8b_") and not dry]
    lines += [f"- {row['stage']}: {row['kernels_left_out']}" for row in timed if "kernels_left_out" in row]
    return lines + fused_lines(timed)


def fused_lines(timed: list[Row]) -> list[str]:
    """Return a line for each fused group whose lone run was timed too."""
    lone = {row["stage"]: row for row in timed if row["stage"].endswith(LONE)}
    groups = [row for row in timed if row["stage"] + LONE in lone]
    return [beside_lone(group, lone[group["stage"] + LONE]) for group in groups]


def beside_lone(group: Row, lone: Row) -> str:
    """Return a line that puts a step of a fused group beside the steps that its trials would take apart."""
    trials, fused, apart = group["trials"], group["median_step_seconds"], lone["median_step_seconds"]
    return (
        f"- {group['stage']}: a step of {trials} trials on one base takes {fused:.3f} s, {trials} lone steps take "
        f"{trials * apart:.3f} s: {trials * apart / fused:.2f} × as fast"
    )


def beside_nemo(row: Row) -> str:
    """Return a line that puts a training of all 32 layers beside NeMo Automodel's."""
    speed, used = row["useful_tokens_per_second"], row.get("useful_flops_utilization", 0.0)
    return (
        f"- {row['stage']}: {speed:.0f} useful tokens/s, {speed / NEMO_TOKENS_PER_SECOND - 1:+.1%} beside the "
        f"{NEMO_TOKENS_PER_SECOND} of NeMo Automodel (Llama-3.1-8B, LoRA, one H100); useful MFU {used:.1%}, "
        f"{100 * (used - NEMO_UTILIZATION):+.1f} points beside its {NEMO_UTILIZATION:.1%}"
    )


def cell(value: Any) -> str:
    """Return a value as it may stand in a table."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value).replace("|", "/").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main())
