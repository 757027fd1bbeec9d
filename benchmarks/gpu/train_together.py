"""Train the trials of a fused sweep on one base, or one of them by itself; both are timed by their metrics.jsonl.

python -m benchmarks.gpu.train_together [--trials 8] RESULT.json [overrides]

With ``--trials 8`` a group of eight that differ by their learning rates alone is trained by ``--together`` of
``python -m trainer.train``; without it the run that the overrides say.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trainer.config
import trainer.train
from benchmarks.gpu.train_timed import WARM_UP_STEPS, peak_memory
from trainer.distributed.process_group import leave
from trainer.tracking.files import read_metrics

RATE_RATIO = 1.25  # between neighbours of a group


def main(arguments: Sequence[str] | None = None) -> int:
    """Train once and write what the steps took. Returns the training's exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=None, help="trials of a fused group")
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args(arguments)
    if asked.trials is None:
        runs = [asked.overrides]
        code = trainer.train.main(asked.overrides)
    else:
        runs = trials_of(asked.overrides, asked.trials)
        code = trainer.train.main(["--together", str(write_group(runs))])
    if code == 0:
        folders = [trainer.config.run_folder(trainer.config.load(run)) for run in runs]
        asked.result.write_text(json.dumps(summary(folders)))
    return code


def trials_of(overrides: list[str], count: int) -> list[list[str]]:
    """Return the overrides of each trial: a learning rate and a run folder of its own, in the folder of the run."""
    config = trainer.config.load(overrides)
    rate, folder = config.optim.learning_rate, trainer.config.run_folder(config)
    assert rate is not None, "the overrides give the first trial's learning rate"
    return [
        [*overrides, f"optim.learning_rate={rate * RATE_RATIO**k!r}", f"run.dir={folder}", f"run.name=trial{k}"]
        for k in range(count)
    ]


def write_group(trials: list[list[str]]) -> Path:
    """Write the file that ``--together`` reads, where a sweep would have it."""
    file = trainer.config.run_folder(trainer.config.load(trials[0])).parent / ".together" / "kit" / "group.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"config": None, "trials": trials, "halving": None}))
    return file


def summary(folders: Sequence[Path]) -> dict[str, Any]:
    """Return times, rates and memory of the steps after the first ones, which warm up.

    Args:
        folders: of the trials that were trained together; of a lone run its own.
    """
    runs = [[line for line in read_metrics(folder) if "step_seconds" in line] for folder in folders]
    steps = list(zip(*runs, strict=True))
    # each trial logs the step that the group made together: it took as long as it did for the one that says the most
    seconds = [max(line["step_seconds"] for line in step) for step in steps]
    timed, total = steps[WARM_UP_STEPS:], sum(seconds[WARM_UP_STEPS:])
    return {
        "trials": len(folders),
        "median_step_seconds": sorted(seconds[WARM_UP_STEPS:])[len(timed) // 2],
        "step_seconds": [round(each, 4) for each in seconds],
        "useful_tokens_per_second": sum(line["useful_tokens"] for step in timed for line in step) / total,
        "losses": [[round(line["loss"], 5) for line in run] for run in runs],
        **peak_memory(),
    }


if __name__ == "__main__":
    leave(main())
