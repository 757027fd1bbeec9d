"""A sweep of eight LoRA trials fused into one process, beside the same trials trained one after the other.

python benchmarks/sweep.py [--times 3] [--seeds 10]        to try it: --tiny --steps 4 --trials 2 --times 1 --seeds 1

SmolLM2-135M, the headlines, r = 4, 8, 16, 64 with two learning rates each, 30 updates of 16 rows. In turns, forth and
back, in one sitting: eight `afina train`, each a fresh process; the sweep fused; fused and stopped early; where it is
named in `--sides`, the sweep as forks of one process too (`sweep.fuse=off`). Wall time is the command's, from its start
to its end. Then, with the tiny model and other seeds: does early stopping find the trial that is best in the whole
grid? The whole measurement (about an hour on 2 cores) writes sweep.md and sweep.json beside this file; a smaller one
only prints.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks._rows import prepare_rows
from benchmarks._sweep_page import page
from benchmarks._tree import run_watched
from benchmarks.gpu.measure import relative_distance
from launch.sweep.plan import plan_sweep
from trainer.tracking.files import find_summary, read_metrics
from trainer.tracking.logs import configure_logging

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SIDES = ("apart", "forked", "fused", "asha")
MEASURED = ("apart", "fused", "asha")
FUSED = ("fused", "asha")
RANKS, RATES = (4, 8, 16, 64), ("5e-4", "2e-3")
STEPS, TRIALS, TIMES, SEEDS = 30, 8, 3, 10
QUIET = ["log=off", "eval.metrics=[loss]", "eval.before=false", "checkpoint.every_steps=0"]
# Nine trials, 27 updates; the best third of three updates goes on to nine, the best of these to the end.
CHOICE = [
    *("debug=tiny", *QUIET, "data.max_rows=216", "data.validation=64", "eval.max_rows=64", "eval.every_steps=3"),
    *("batch.max_steps=27", "method.r=2,4,8", "optim.learning_rate=1e-3,1e-2,1e-1"),
]
CHOICE_ASHA = ["sweep.early_stopping=asha", "sweep.min_steps=3", "sweep.reduction_factor=3"]


def main() -> None:
    """Measure, print the page, and write it where nothing was made smaller."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="updates of a trial")
    parser.add_argument("--trials", type=int, default=TRIALS, choices=(2, 4, 6, 8))
    parser.add_argument("--times", type=int, default=TIMES, help="turns; the page shows their medians")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="sweeps of the tiny model; 0: none")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=MEASURED, help="what is run in a turn")
    parser.add_argument("--tiny", action="store_true", help="the tiny model in the place of SmolLM2-135M")
    asked = parser.parse_args()
    configure_logging()
    found: dict[str, Any] = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "cores": os.cpu_count(),
        "model": "the tiny model" if asked.tiny else "SmolLM2-135M",
        "steps": asked.steps,
        "trials": asked.trials,
        "min_steps": rung(asked.steps),
    }
    grid = overrides(asked.tiny, asked.steps, asked.trials)
    prepare_rows(overrides(asked.tiny, asked.steps, trials=0))  # fetched and prepared before anything is timed
    found["turns"] = [measure_turn(turn, grid, asked.sides, found["min_steps"]) for turn in range(asked.times)]
    found["choices"] = [choose(seed) for seed in range(asked.seeds)]
    found["load"] = os.getloadavg()[2]
    text = page(found)
    print(text)
    whole = (asked.steps, asked.trials, tuple(asked.sides)) == (STEPS, TRIALS, MEASURED) and not asked.tiny
    if whole and asked.times >= TIMES and asked.seeds >= SEEDS:
        (HERE / "sweep.md").write_text(text)
        (HERE / "sweep.json").write_text(json.dumps(found, indent=1) + "\n")


def overrides(tiny: bool, steps: int, trials: int) -> list[str]:
    """Return the sweep as a user would type it; of no trials: what they have in common."""
    grid = [f"method.r={','.join(map(str, RANKS[: trials // 2]))}", f"optim.learning_rate={','.join(RATES)}"]
    return [
        *(["debug=tiny"] if tiny else ["experiment=demo"]),
        *("method=lora", *QUIET, "batch.global_size=16", f"batch.max_steps={steps}", f"data.max_rows={16 * steps}"),
        *("data.validation=64", "eval.max_rows=64"),
        *(grid if trials else []),
    ]


def rung(steps: int) -> int:
    """Return the updates before the first choice: of eight trials a half goes on each time, as in 3, 6, 12 of 30."""
    return max(1, steps // 10)


def measure_turn(turn: int, grid: list[str], sides: list[str], min_steps: int) -> dict[str, Any]:
    """Run every side once; return what each took, and how far the adapters are from those trained apart."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for side in sides if turn % 2 == 0 else reversed(sides):
            found[side] = measure(side, grid, min_steps, folder)
            print(f"turn {turn + 1}, {side}: {found[side]['seconds']:.1f} s", flush=True)
        if "apart" in sides:
            for side in {"forked", "fused"}.intersection(sides):
                found[side]["distance"] = largest_distance(folder / side / "s", folder / "apart" / "s")
    return found


def measure(side: str, grid: list[str], min_steps: int, folder: Path) -> dict[str, Any]:
    """Run one side; return its wall time, its steps' time, its peak memory and its scores."""
    placed = [*grid, f"run.dir={folder / side}", "run.name=s"]
    if side == "apart":
        commands = [["train", *trial.overrides] for trial in plan_sweep(placed)[1]]
    else:
        asha = ["sweep.early_stopping=asha", f"sweep.min_steps={min_steps}", "sweep.reduction_factor=2"]
        fuse = "auto" if side in FUSED else "off"
        more = [f"sweep.fuse={fuse}", "sweep.parallel=1", *(asha if side == "asha" else [])]
        commands = [["sweep", *placed, *more]]
    used = [afina(command, folder / f"{side}.log", folder) for command in commands]
    sweep = folder / side / "s"
    check_fused(sweep, side in FUSED)
    losses = {trial.name: find_summary(trial)["metrics"]["eval_loss"] for trial in finished(sweep)}
    return {
        "seconds": sum(usage.seconds for usage in used),
        "step_seconds": group_step_seconds(sweep) if side in FUSED else lone_step_seconds(sweep),
        "peak_bytes": max(usage.peak_bytes for usage in used),
        "eval_losses": losses,
    }


def afina(arguments: list[str], log: Path, cwd: Path) -> Any:
    """Run a verb in a process of its own."""
    environment = {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "offline"}
    return run_watched([sys.executable, "-m", "trainer.cli", *arguments], log, cwd, environment)


def check_fused(sweep: Path, wanted: bool) -> None:
    """Make sure that a figure is of what it says: a sweep that cannot fuse its trials trains them as forks."""
    groups = list(sweep.glob(".together/*/group.json"))
    if bool(groups) != wanted:
        raise SystemExit(f"{sweep}: {len(groups)} fused groups, {'some' if wanted else 'none'} expected")


def run_folders(sweep: Path) -> list[Path]:
    """Return the trials' run folders, by name."""
    return sorted(file.parent for file in sweep.glob("[!.]*/metrics.jsonl"))


def finished(sweep: Path) -> list[Path]:
    """Return the run folders of the trials that were trained to their end."""
    return [folder for folder in run_folders(sweep) if find_summary(folder)["status"] == "finished"]


def lone_step_seconds(sweep: Path) -> float:
    """Return the time of all steps of all trials, each trained by itself."""
    return sum(sum(step_seconds(folder).values()) for folder in run_folders(sweep))


def group_step_seconds(sweep: Path) -> float:
    """Return the time of a group's steps. Each trial of the group logs the step that they made together: it counts
    once, as long as it was for the trial that says the most."""
    steps: dict[int, float] = {}
    for folder in run_folders(sweep):
        for step, seconds in step_seconds(folder).items():
            steps[step] = max(seconds, steps[step]) if step in steps else seconds
    return sum(steps.values())


def step_seconds(folder: Path) -> dict[int, float]:
    """Return the time of each step that metrics.jsonl has."""
    return {line["step"]: line["step_seconds"] for line in read_metrics(folder) if "step_seconds" in line}


def largest_distance(sweep: Path, others: Path) -> float:
    """Return the largest relative Frobenius distance of a tensor between the same trials of two folders."""
    names = [folder.name for folder in finished(sweep)]
    assert names == [folder.name for folder in finished(others)], f"{sweep} and {others}: other trials"
    distances = []
    for name in names:
        mine, theirs = (load_file(each / name / "adapter" / "adapter_model.safetensors") for each in (sweep, others))
        assert mine.keys() == theirs.keys(), f"{name}: other tensors"
        distances += [relative_distance(mine[key], theirs[key]) for key in theirs]
    return max(distances)


def choose(seed: int) -> dict[str, Any]:
    """Sweep the tiny model with a seed, wholly and stopped early; return both winners and what they have come to."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        typed = ["sweep", *CHOICE, f"run.seed={seed}", "sweep.fuse=auto", "sweep.parallel=1", f"run.dir={folder}"]
        afina([*typed, "run.name=grid"], folder / "log", folder)
        afina([*typed, *CHOICE_ASHA, "run.name=asha"], folder / "log", folder)
        for sweep in ("grid", "asha"):
            check_fused(folder / sweep, wanted=True)
        losses = {trial.name: find_summary(trial)["metrics"]["eval_loss"] for trial in finished(folder / "grid")}
        winners = {f"{sweep}_winner": best_trial(folder / sweep) for sweep in ("grid", "asha")}
    print(f"seed {seed}: {winners}", flush=True)
    return {"seed": seed, **winners, "grid_losses": losses}


def best_trial(sweep: Path) -> str:
    """Return the name of the first trial of a sweep's table."""
    with (sweep / "sweep.csv").open(newline="") as file:
        return next(Path(row["folder"]).name for row in csv.DictReader(file) if row["rank"] == "1")


if __name__ == "__main__":
    main()
