"""How long a sweep of eight tiny trials takes, beside eight `afina train` one after the other; in turns.

python benchmarks/sweep_start.py [TURNS]

Only the ratio says something: both have the machine as it is then. Writes benchmarks/sweep_start.md.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).resolve().parent
RANKS = (2, 3, 4, 5, 6, 7, 8, 9)
KEYS = ["debug=tiny", "batch.max_steps=4", "eval.metrics=[loss]", "eval.before=false", "log=off"]


def main(turns: int) -> None:
    """Measure in turns and write the page."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    ratios = []
    for turn in range(turns):
        with tempfile.TemporaryDirectory() as folder:
            separate = sum(seconds(["train", *KEYS, f"method.r={r}"], folder, environment) for r in RANKS)
            sweep = seconds(["sweep", *KEYS, f"method.r={','.join(map(str, RANKS))}"], folder, environment)
        ratios.append(sweep / separate)
        print(f"turn {turn + 1}: {separate:.0f} s apart, {sweep:.0f} s as a sweep: {ratios[-1]:.2f}", flush=True)
    shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    page = f"""# Start-up of a sweep

`python benchmarks/sweep_start.py`: {len(RANKS)} trials of `debug=tiny`, 4 updates each, as a sweep and as `afina train`
one after the other, in turns on the same machine ({os.cpu_count()} CPU cores, {datetime.now(UTC):%Y-%m-%d}; load
average {os.getloadavg()[2]:.0f}, its own included).

| | wall time of the sweep over that of the runs apart |
|---|---|
| median of {turns} | **{statistics.median(ratios):.2f}** |
| each turn | {shown} |

A sweep loads the libraries once and forks a process for each trial; its adapters are byte-equal to those of
`afina train` (`tests/end_to_end/test_sweep_verb.py`). What is left of a trial is its own: data, model, verification of
the trie, updates. The longer a trial, the less there is to save.
"""
    (HERE / "sweep_start.md").write_text(page)


def seconds(arguments: list[str], folder: str, environment: dict[str, str]) -> float:
    """Run a verb to its end; return its wall time."""
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "trainer.cli", *arguments],
        cwd=folder,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - begin


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
