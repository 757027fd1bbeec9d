"""Kill a training again and again, start it again by the same command, and compare its end with the undisturbed one's.

python benchmarks/chaos.py [--kills 200] [--seed 0]

The tiny model on two ranks, LoRA and all weights, ZeRO 0 to 3 in turn. One rank or both are killed (SIGKILL) at a drawn
point: while importing, at a stage of a drawn step, in a save before and after its hashes and its marker, in an
evaluation, at the end. A run that was killed is started again, and killed again, until it ends; then every trained
tensor must have the undisturbed run's bits. Goodput is the time of the steps that count over the whole time. Writes
chaos.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
POINTS = (
    *("import", "start", "data", "forward and backward", "reduce", "update", "save"),
    *("written", "hashed", "committed", "evaluate", "end"),
)
RANKS = ("0", "1", "0,1")
STEPS = 24
LIMIT_SECONDS = 300  # of one start
KEYS = (
    *("debug=tiny", "log=off", "batch.epochs=50", f"batch.max_steps={STEPS}", "checkpoint.every_steps=3"),
    *("eval.every_steps=8", "eval.before=false", "eval.metrics=[loss]", "generate.max_new_tokens=4"),
)
CASES = tuple((method, zero) for zero in ("stage0", "stage1", "stage2", "stage3") for method in ("lora", "full"))


@dataclass
class Found:
    """What came of one case.

    Attributes:
        name: method and ZeRO stage.
        runs: disturbed runs that came to their end.
        equal: of them, those with the undisturbed run's bits.
        kills: over all of them.
        step_seconds, seconds: of the steps that count, and altogether.
        points: how often each was met.
    """

    name: str
    runs: int = 0
    equal: int = 0
    kills: int = 0
    step_seconds: float = 0.0
    seconds: float = 0.0
    points: dict[str, int] = field(default_factory=dict)


def main() -> int:
    """Kill until there were enough, and write the table. Returns 1 where an end differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    draw, found = random.Random(asked.seed), {case: Found(" ".join(case)) for case in CASES}
    with tempfile.TemporaryDirectory() as folder:
        expected: dict[tuple[str, str], str] = {}
        while (killed := sum(f.kills for f in found.values())) < asked.kills:
            case = min(CASES, key=lambda c: found[c].kills)
            if case not in expected:
                start(Path(folder), case, "straight", "none:0:")
                expected[case] = digest(Path(folder) / "straight" / "-".join(case))
            disturb(Path(folder), case, expected[case], found[case], draw, asked.kills - killed)
            print(found[case], flush=True)
    text = table(list(found.values()))
    print(text)
    (HERE / "chaos.md").write_text(text)
    return int(any(f.equal != f.runs for f in found.values()))


def disturb(folder: Path, case: tuple[str, str], expected: str, found: Found, draw: random.Random, kills: int) -> None:
    """Train once to the end, through some kills, and compare."""
    name = f"disturbed-{found.runs}"
    wanted = min(kills, draw.randint(3, 8))
    begin, killed, code = time.monotonic(), 0, -1
    while code != 0:
        point = draw.choice(POINTS) if killed < wanted else "none"
        chaos = f"{point}:{draw.randint(1, STEPS)}:{draw.choice(RANKS)}"
        code = start(folder, case, name, chaos)
        if code:
            killed += 1
            found.points[point] = found.points.get(point, 0) + 1
            assert point != "none", f"{case} fails by itself"
    run = folder / name / "-".join(case)
    found.seconds += time.monotonic() - begin
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found.step_seconds += sum(record["step_seconds"] for record in records if "step_seconds" in record)
    found.runs, found.kills, found.equal = found.runs + 1, found.kills + killed, found.equal + (digest(run) == expected)


def start(folder: Path, case: tuple[str, str], name: str, chaos: str) -> int:
    """Start the training on two ranks, once; return its exit code."""
    method, zero = case
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
        "--local-addr=127.0.0.1",
    ]
    command += [str(HERE / "_chaos_rank.py"), *KEYS, f"method={method}", f"zero={zero}"]
    command += [f"run.dir={folder / name}", f"run.name={method}-{zero}", *(["rank=null"] if method == "full" else [])]
    environment = {**os.environ, "AFINA_CHAOS": chaos, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (folder / "log.txt").open("a") as log:
        done = subprocess.run(
            command, env=environment, stdout=log, stderr=log, check=False, cwd=folder, timeout=LIMIT_SECONDS
        )
    if chaos.startswith("none") and done.returncode:
        raise SystemExit(f"an undisturbed start fails:\n{(folder / 'log.txt').read_text()[-4000:]}")
    return done.returncode


def digest(run: Path) -> str:
    """Return the hash of every trained tensor of a finished run."""
    files = sorted([*run.glob("adapter/adapter_model.safetensors"), *run.glob("model/*.safetensors")])
    assert files, f"{run} has nothing that was trained"
    out = hashlib.sha256()
    for file in files:
        for name, tensor in sorted(load_file(file).items()):
            out.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return out.hexdigest()


def table(found: list[Found]) -> str:
    """Return the table as Markdown."""
    kills, runs, equal = (sum(getattr(f, name) for f in found) for name in ("kills", "runs", "equal"))
    goodput = sum(f.step_seconds for f in found) / max(sum(f.seconds for f in found), 1e-9)
    minutes = sum(f.seconds for f in found) / 60
    lines = [
        *("# Killed and started again", ""),
        f"{kills} kills in {runs} runs of the tiny model on two ranks; {equal} of {runs} ended with the undisturbed",
        f"run's bits. Goodput {goodput:.1%} at {kills / minutes:.1f} kills a minute: a start takes longer than the",
        f"{STEPS} steps.",
        *("", "| case | kills | runs | equal | points |", "|---|---|---|---|---|"),
    ]
    for f in found:
        points = ", ".join(f"{name} {count}" for name, count in sorted(f.points.items()))
        lines.append(f"| {f.name} | {f.kills} | {f.runs} | {f.equal} | {points} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
