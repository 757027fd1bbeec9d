"""Add what a stage found to the campaign's results, as JSON lines.

python -m benchmarks.gpu.collect RESULTS STAGE CODE SECONDS LOG RESULT
"""

from __future__ import annotations

import argparse
import fcntl
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str] | None = None) -> None:
    """Append the RESULT lines of the log, then one line of the stage: how it ended, and its own result file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, help="where the lines go")
    parser.add_argument("stage")
    parser.add_argument("code", type=int, help="its exit code")
    parser.add_argument("seconds", type=float)
    parser.add_argument("log", type=Path, help="what it has printed")
    parser.add_argument("result", type=Path, help="a JSON object that it has written, or no such file")
    asked = parser.parse_args(arguments)
    text = asked.log.read_text(errors="replace")
    own = {"stage": asked.stage, "code": asked.code, "seconds": asked.seconds}
    own |= json.loads(asked.result.read_text()) if asked.result.exists() else {}
    lines = [*results_in(text), own | end_of(text, asked.stage, asked.code)]
    with asked.results.open("a") as out:
        fcntl.flock(out, fcntl.LOCK_EX)  # stages that run side by side write whole lines
        out.write("".join(json.dumps(line) + "\n" for line in lines))


def results_in(text: str) -> list[dict[str, Any]]:
    """Return what was printed as results."""
    return [json.loads(line.removeprefix("RESULT ")) for line in text.splitlines() if line.startswith("RESULT ")]


def end_of(text: str, stage: str, code: int) -> dict[str, str]:
    """Return the last lines of a failure, the summary of pytest, and what a training chose."""
    lines, found = [line for line in text.splitlines() if line.strip()], {}
    if code:
        found["tail"] = " | ".join(lines)[-500:]
    if stage == "pytest" and lines:
        found["summary"] = lines[-1].strip("= ")[:200]
    return found | choices_in(lines)


def choices_in(lines: list[str]) -> dict[str, str]:
    """Return what a training has said of its packing, of the kernels in use, and of those that it left out."""
    found = {}
    if packing := [line for line in lines if line.startswith("packing:")]:
        found["packing"] = packing[-1][:250]
    if kernels := [line.removeprefix("kernels: ") for line in lines if line.startswith("kernels: ")]:
        found["kernels"] = "none" if kernels[-1].startswith("none") else kernels[-1].split(", verified")[0]
    if left_out := [line for line in kernels if " left out on " in line]:
        found["kernels_left_out"] = " | ".join(left_out)[:500]
    return found


if __name__ == "__main__":
    main()
