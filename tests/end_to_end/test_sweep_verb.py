"""``afina sweep`` for real: the same sweep started twice at once is one sweep that two processes work at.

A trial is what ``afina train`` makes of it, to the byte, also one that was stopped at a rung and went on.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from tests.helpers.processes import afina, stop_tree
from trainer.tracking.files import read_metrics

NUMBERS = ("step", "loss", "grad_norm", "eval_loss")
KEYS = [
    "sweep",
    "sweep.fuse=off",
    "debug=tiny",
    "run.name=s",
    "method.r=4,8",
    "eval.metrics=[loss]",
    "eval.before=false",
]


def test_two_equal_sweeps_at_once_share_the_trials(tiny_model: Path, tmp_path: Path) -> None:
    del tiny_model
    script = Path(sys.executable).with_name("afina")
    environment = {**os.environ, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    sweeps = []
    try:
        for name in ("one", "two"):
            out, log = (tmp_path / f"{name}.{kind}" for kind in ("out", "log"))
            with out.open("w") as stdout, log.open("w") as stderr:
                command = [script, *KEYS]
                sweeps.append(
                    subprocess.Popen(
                        command, cwd=tmp_path, env=environment, stdout=stdout, stderr=stderr, start_new_session=True
                    )
                )
        codes = [sweep.wait(400) for sweep in sweeps]
    finally:
        for sweep in sweeps:
            stop_tree(sweep)
    logs = [(tmp_path / f"{name}.log").read_text() for name in ("one", "two")]
    assert codes == [0, 0], logs
    lines = "\n".join(logs).splitlines()
    for trial in ("[1/2] r4", "[2/2] r8"):
        assert len([line for line in lines if line.endswith(f"{trial}: starting")]) == 1, logs
        assert len([line for line in lines if line.endswith(f"{trial}: finished before")]) == 1, logs
    tables = [(tmp_path / f"{name}.out").read_text().splitlines()[-3:] for name in ("one", "two")]
    assert tables[0] == tables[1]
    assert ["finished" in row for row in tables[0]] == [False, True, True]
    with (tmp_path / "runs" / "s" / "sweep.csv").open() as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["finished", "finished"]
    for folder in ("r4", "r8"):
        assert [r["step"] for r in read_metrics(tmp_path / "runs" / "s" / folder)] == list(range(1, 9))


def test_a_trial_is_byte_equal_to_a_run_by_itself(tiny_model: Path, tmp_path: Path) -> None:
    """Three at once, as forks, of which one goes on from its rung."""
    del tiny_model
    keys = ["debug=tiny", "eval.metrics=[loss]", "eval.every_steps=2", "eval.before=false", "log=off"]
    early = ["sweep.early_stopping=asha", "sweep.min_steps=2", "sweep.parallel=3", "sweep.fuse=off"]
    environment = {"OMP_NUM_THREADS": "1"}
    sweep = ["sweep", *keys, *early, "method.r=2,4,8", "run.name=s"]
    done = afina(*sweep, cwd=tmp_path, env=environment, timeout_seconds=400)
    with (tmp_path / "runs" / "s" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["finished", *["stopped at rung 0, step 2"] * 2], done.tail()
    winner, steps = (
        Path(rows[0]["folder"]),
        {row["method.r"]: len(read_metrics(tmp_path / row["folder"])) for row in rows},
    )
    assert sorted(steps.values()) == [2, 2, 8]
    # by itself: with the command line that an agent of W&B would start
    afina("sweep", *keys, "method.r=2,4,8", "--wandb-file", "s.yaml", cwd=tmp_path)
    *command, last = yaml.safe_load((tmp_path / "s.yaml").read_text())["command"]
    assert (command[0], last) == ("afina", "${args_no_hyphens}")
    afina(*command[1:], f"method.r={rows[0]['method.r']}", cwd=tmp_path, env=environment)
    (alone,) = (tmp_path / "runs").glob("tiny-lora-*")
    ours, theirs = tmp_path / winner / "adapter", alone / "adapter"
    weights, settings = "adapter_model.safetensors", "adapter_config.json"
    assert (ours / weights).read_bytes() == (theirs / weights).read_bytes()
    mine, other = (json.loads((folder / settings).read_text()) for folder in (ours, theirs))
    assert mine | {"target_modules": sorted(mine["target_modules"])} == other | {
        "target_modules": sorted(other["target_modules"])  # PEFT writes a set
    }
    for step, same in zip(read_metrics(tmp_path / winner), read_metrics(alone), strict=True):
        assert [step.get(k) for k in NUMBERS] == [same.get(k) for k in NUMBERS]
