"""Kill a training again and again, start it again by the same command, and compare its end with the undisturbed one's.

python benchmarks/chaos.py [--kills 200] [--seed 0] [--cases 8] [--minutes 5] [--verdicts 20] [--damaged 500]
                           [--twice 20] [--out benchmarks/chaos.md]

The tiny model on two ranks, LoRA and all weights, ZeRO 0 to 3 in turn. One rank or both are killed (SIGKILL): while the
model is built, at a stage of a drawn step, in a save before and after its hashes and its marker, in an evaluation, at
the end, or at any moment by the clock; sometimes torchrun itself is. A run that was killed is started again, and killed
again, until it ends; then every trained tensor must have the undisturbed run's bits, and no process may be left. Each
tenth start is torchrun's; the other ranks are forked from this process, which has imported the libraries: that saves
most of the time.

Goodput is the time of the steps that count over the whole time, of one more run that is killed once a minute. Verdicts:
rank 1 is killed, stopped or fails at a drawn stage, and one line must name it, with its step and stage. Damaged: a byte
of a checkpoint is changed, or a file is shortened or gone, and the checkpoint before it must be taken. Twice: two
starts of one run at once, of which one must train and the other say so. Then the disk becomes full while a run trains.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]
os.environ["OMP_NUM_THREADS"] = "1"

from benchmarks._chaos_counts import (  # noqa: E402
    damaged_files_found,
    full_disk_is_survived,
    one_of_two_trains,
)
from benchmarks._chaos_start import Chaos, Starter  # noqa: E402

POINTS = (
    *("import", "built", "resumed", "data", "forward and backward", "reduce", "update", "save", "written", "hashed"),
    *("committed", "evaluate", "end", "final written", "any moment"),
)
EVERY_STEP = ("data", "forward and backward", "reduce", "update")
RANKS = ("0", "1", "0,1")
STEPS = 24
STEPS_PER_MINUTE = 900  # of the tiny model, kills included
KEYS = (
    *("debug=tiny", "log=off", "batch.epochs=5000", "eval.every_steps=8", "eval.before=false", "eval.metrics=[loss]"),
    *("checkpoint.every_steps=3", "fault.timeout_seconds=10"),
)
CASES = tuple((method, zero) for zero in ("stage0", "stage1", "stage2", "stage3") for method in ("lora", "full"))
Case = tuple[str, str]


@dataclass
class Found:
    """What came of one case: disturbed runs that ended, those of them with the undisturbed run's bits, kills, and how
    often each point was met."""

    name: str
    runs: int = 0
    equal: int = 0
    kills: int = 0
    points: dict[str, int] = field(default_factory=dict)


def main() -> int:
    """Kill until there were enough, and write the table. Returns 1 where an end differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=len(CASES))
    parser.add_argument("--minutes", type=float, default=5.0, help="of the run that goodput is measured by; 0: none")
    parser.add_argument("--verdicts", type=int, default=20)
    parser.add_argument("--damaged", type=int, default=500)
    parser.add_argument("--twice", type=int, default=20)
    parser.add_argument("--out", type=Path, default=HERE / "chaos.md")
    asked = parser.parse_args()
    cases = CASES[: asked.cases]
    draw, found = random.Random(asked.seed), {case: Found(" ".join(case)) for case in cases}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        starter, expected = Starter(Path(folder)), {}
        while (killed := sum(f.kills for f in found.values())) < asked.kills:
            case = min(cases, key=lambda c: found[c].kills)
            if case not in expected:
                start(starter, case, "straight", Chaos())
                expected[case] = digest(Path(folder) / "straight" / "-".join(case))
            disturb(starter, case, expected[case], found[case], draw, asked.kills - killed)
            print(f"{time.monotonic() - begin:.0f} s: {found[case]}", flush=True)
        minutes = (time.monotonic() - begin) / 60
        print(table(list(found.values()), minutes), flush=True)
        goodput = measure_goodput(starter, asked.minutes, draw) if asked.minutes else ""
        keys = [*KEYS, f"batch.max_steps={STEPS}", f"run.dir={starter.folder / 'twice'}"]
        alone = one_of_two_trains(starter, keys, asked.twice) if asked.twice else 0
        runs = sorted((starter.folder / "twice").glob("two-*")) if asked.twice else []
        sound = damaged_files_found(runs[0], asked.damaged, draw) if runs else asked.damaged
        survived = None
        if ("lora", "stage0") in expected:
            first = ("lora", "stage0")
            survived = full_disk_is_survived(
                starter, lambda name, chaos: start(starter, first, name, chaos), digest, "-".join(first)
            )
        right = sum(is_named(Path(folder), k, draw) for k in range(asked.verdicts))
    text = table(list(found.values()), minutes) + goodput
    text += f"\nThe rank that was lost, its step and its stage were named in {right} of {asked.verdicts} cases.\n"
    text += (
        f"Of {asked.damaged} damaged checkpoints none was loaded in {sound}, and the one before was taken. Of "
        f"{asked.twice} pairs\nof starts at one moment, one trained and the other said so in {alone}.\n"
    )
    if survived is not None:
        text += f"A run on a disk that became full ended, with room again, with the same bits: {survived}.\n"
    print(text)
    asked.out.write_text(text)
    is_good = (right, sound, alone) == (asked.verdicts, asked.damaged, asked.twice) and survived is not False
    return int(not is_good or any(f.equal != f.runs for f in found.values()))


def disturb(starter: Starter, case: Case, expected: str, found: Found, draw: random.Random, kills: int) -> None:
    """Train once to the end, through some kills, and compare."""
    name = f"disturbed-{found.runs}"
    run = starter.folder / name / "-".join(case)
    wanted = min(kills, draw.randint(3, 8))
    killed = 0
    while True:
        chaos = drawn(draw, newest(run)) if killed < wanted else Chaos()
        ended = start(starter, case, name, chaos)
        if ended == 0:
            break
        killed += 1
        found.points[chaos.point] = found.points.get(chaos.point, 0) + 1
    found.runs, found.kills, found.equal = found.runs + 1, found.kills + killed, found.equal + (digest(run) == expected)


def drawn(draw: random.Random, done: int) -> Chaos:
    """Draw an end that is still to come after ``done`` saved steps."""
    point = draw.choice(POINTS)
    if done >= STEPS and point in EVERY_STEP:
        point = "end"
    return Chaos(point, min(STEPS, draw.randint(done + 1, STEPS + 1)), draw.choice(RANKS), draw.uniform(0.2, 8.0))


def newest(run: Path) -> int:
    """Return the step of a run's newest checkpoint; 0 without one."""
    return max((int(f.parent.name.split("-")[1]) for f in run.glob("checkpoints/step-*/COMPLETE")), default=0)


def start(starter: Starter, case: Case, name: str, chaos: Chaos, steps: int = STEPS, more: Sequence[str] = ()) -> int:
    """Start the training once; return 0 where it came to its end."""
    method, zero = case
    keys = [*KEYS, f"method={method}", f"zero={zero}", *(["rank=null"] if method == "full" else [])]
    keys += [*more, f"batch.max_steps={steps}", f"run.dir={starter.folder / name}", f"run.name={method}-{zero}"]
    return starter.start(keys, chaos)


def measure_goodput(starter: Starter, minutes: float, draw: random.Random) -> str:
    """Train once under ZeRO-2 while a rank is killed each minute; return the line of the table."""
    case, begin, kills = ("lora", "stage2"), time.monotonic(), 0
    steps = int(STEPS_PER_MINUTE * minutes)
    more = ["eval.every_steps=0", "checkpoint.every_steps=50"]
    while start(starter, case, "minutely", Chaos("any moment", 0, draw.choice(RANKS), 60.0), steps, more):
        kills += 1
    seconds = time.monotonic() - begin
    run = starter.folder / "minutely" / "-".join(case)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    useful = sum(record.get("step_seconds", 0.0) for record in records)
    return (
        f"\nGoodput at one kill a minute: {useful / seconds:.1%} ({useful:.0f} s of steps that count in "
        f"{seconds:.0f} s,\n"
        f"{kills} kills, {steps} steps of {1000 * useful / steps:.0f} ms, a checkpoint every 50 steps);\n"
        "what is lost is the start-up after each kill, evaluations and saves.\n"
    )


def is_named(folder: Path, number: int, draw: random.Random) -> bool:
    """Lose rank 1, and return whether one line and the summary name it, with its step and stage."""
    starter = Starter(folder / f"verdict-{number}", term_seconds=3.0)
    action = ("kill", "stop", "raise")[number % 3]
    chaos = Chaos(draw.choice(("data", "forward and backward", "update")), draw.randint(2, STEPS - 1), "1", 0, action)
    start(starter, ("lora", draw.choice(("stage0", "stage2", "stage3"))), "lost", chaos)
    log = (starter.folder / "log.txt").read_text()
    named = re.findall(r"rank (\d) \(process \d+ on [^)]+\), step (\d+), ([a-z ]+):", log)
    (run,) = (starter.folder / "lost").glob("*/summary.json")
    summary = json.loads(run.read_text())
    says = str(summary["error"]["rank"]) if action == "raise" else summary["error"]["message"]
    is_right = named == [("1", str(chaos.step), chaos.point)] and summary["status"] == "failed" and "1" in says
    if not is_right:
        print(f"verdict {number}: {chaos}: {named}, {summary['error']}\n{log[-3000:]}")
    return is_right


def digest(run: Path) -> str:
    """Return the hash of every trained tensor of a finished run."""
    from safetensors.numpy import load_file

    files = sorted([*run.glob("adapter/adapter_model.safetensors"), *run.glob("model/*.safetensors")])
    assert files, f"{run} has nothing that was trained"
    out = hashlib.sha256()
    for file in files:
        for name, tensor in sorted(load_file(file).items()):
            out.update(name.encode() + tensor.tobytes())
    return out.hexdigest()


def table(found: list[Found], minutes: float) -> str:
    """Return the table as Markdown."""
    kills, runs, equal = (sum(getattr(f, name) for f in found) for name in ("kills", "runs", "equal"))
    lines = [
        *("# Killed and started again", ""),
        f"{kills} kills in {runs} runs of {STEPS} steps of the tiny model, on two ranks: **{equal} of {runs} runs have",
        f"the undisturbed run's bits**. It took {minutes:.0f} minutes; no process was left after any start. The points",
        "are explained in [chaos.py](chaos.py).",
        *("", "| case | kills | runs | equal | points |", "|---|---|---|---|---|"),
    ]
    for f in found:
        points = ", ".join(f"{name} {count}" for name, count in sorted(f.points.items()))
        lines.append(f"| {f.name} | {f.kills} | {f.runs} | {f.equal} | {points} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
