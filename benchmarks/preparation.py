"""A million rows: preparing them once, and starting again on what was prepared.

python benchmarks/preparation.py [--rows 1000000]

Alpaca rows, made from the headlines by joining some and editing each, about 0.4 GB. First `afina data` prepares them,
in a cache of its own; the resident memory of all its processes is summed ten times a second. Then a training starts
twice on the table that is there, up to its first step. Writes preparation.md and preparation.json beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
STARTS = 2


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "rows.jsonl"
        write_rows(source, rows)
        # held-out rows are taken so that the search for leaks between the two is measured too
        overrides = [f"data.path={source}", "data=alpaca", "data.validation=1000", "model=smollm2_135m"]
        found = {"rows": rows, "bytes": source.stat().st_size, **prepare(folder, overrides)}
        found["starts"] = [start(folder, overrides) for _ in range(STARTS)]
    text = table(found)
    print(text)
    (HERE / "preparation.md").write_text(text)
    (HERE / "preparation.json").write_text(json.dumps(found, indent=1) + "\n")


def write_rows(path: Path, rows: int) -> None:
    """Rows that are all unlike: three headlines to read, one to write, and numbers among the words."""
    lines = (ROOT / "examples" / "headlines" / "headlines.jsonl").read_text().splitlines()
    titles = [json.loads(line)["input"] for line in lines]
    draw = random.Random(0)
    with path.open("w") as out:
        for number in range(rows):
            one, two, three, answer = draw.sample(titles, 4)
            row = {
                "instruction": f"Write headline number {number} in the manner of these three.",
                "input": f"1. {one}\n2. {two} ({draw.randrange(10**6)})\n3. {three}",
                "output": f"{answer}, {draw.choice(titles)}",
            }
            out.write(json.dumps(row) + "\n")


def environment(folder: Path) -> dict[str, str]:
    """A cache of this benchmark alone, for tables and model."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "AFINA_CACHE": str(folder / "cache")}


def prepare(folder: Path, overrides: list[str]) -> dict[str, float]:
    """Seconds, and the most memory that all processes held together, of ``afina data`` on a table not there yet."""
    command = [sys.executable, "-m", "trainer.cli", "data", *overrides]
    subprocess.run([sys.executable, "-m", "trainer.cli", "fetch", "smollm2_135m"], env=environment(folder), check=True)
    begin, peak = time.perf_counter(), 0
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(folder), stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            time.sleep(0.1)
    if process.returncode:
        raise SystemExit((folder / "log.txt").read_text()[-3000:])
    return {"seconds": time.perf_counter() - begin, "peak_bytes": peak}


def resident(pid: int) -> int:
    """Resident bytes of a process and all below it, shared pages counted in each."""
    total = 0
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
    return total


def start(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Seconds of each part of a training's start."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    more = ["eval.before=false", "eval.max_rows=8", "batch.max_steps=1", "log=off", "run.name=started"]
    command = [sys.executable, HERE / "_start.py", result, *overrides, *more]
    command += [f"run.dir={folder / 'runs'}", "run.overwrite=true"]
    done = subprocess.run(command, cwd=ROOT, env=environment(folder), capture_output=True, text=True, timeout=600)
    if not result.exists():
        raise SystemExit((done.stdout + done.stderr)[-3000:])
    return dict(json.loads(result.read_text()))


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    best = min(found["starts"], key=lambda s: sum(s.values()))
    rows = found["rows"]
    lines = [
        f"{rows:,} Alpaca rows, {found['bytes'] / 1e9:.2f} GB of JSONL; {os.cpu_count()} cores.",
        "",
        "| what | measured |",
        "|---|---|",
        f"| `afina data`, first time: read, checked, tokenised, written, shown | {found['seconds'] / 60:.1f} min, "
        f"{rows / found['seconds']:,.0f} rows/s |",
        f"| most memory of all its processes together | {found['peak_bytes'] / 2**30:.2f} GiB |",
        *(f"| training on the table that is there: {name} | {seconds:.1f} s |" for name, seconds in best.items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
