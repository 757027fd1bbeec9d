"""Start groups of trials and the same trials by themselves, and compare what they leave."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.processes import Finished
from tests.helpers.reference import worst_distance
from tests.helpers.warm import ranks
from trainer.checkpoint.commit import complete
from trainer.tracking.files import read_metrics, read_summary

SCRIPT = Path(__file__).with_name("together_rank.py")
COMMON = (
    *("debug=tiny", "log=off", "batch.max_steps=6", "eval.every_steps=3", "checkpoint.every_steps=2"),
    *("checkpoint.keep=1", "batch.micro_tokens=1024", "eval.metrics=[loss]", "method.dropout=0.0"),
    # as in tests/distributed/bench.py: elements whose gradient is rounding noise stay where they are
    *("optim.learning_rate=0.01", "optim.eps=1e-5"),
)
TIMES = {
    *("elapsed_seconds", "step_seconds", "data_seconds", "useful_tokens_per_second", "peak_memory_bytes"),
    *("model_flops_utilization", "useful_flops_utilization"),
}


def write_group(folder: Path, trials: Mapping[str, Sequence[str]], *more: str, halving: Any = None) -> Path:
    """Write a group's file as a sweep does, for run folders in ``folder``."""
    file = folder / ".together" / "group" / "group.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    own = [[*COMMON, *more, f"run.dir={folder}", f"run.name={name}", *keys] for name, keys in trials.items()]
    file.write_text(json.dumps({"config": None, "trials": own, "halving": halving}))
    return file


def train(how: str, file: Path, code: int = 0, nproc: int = 1, **disturbance: Any) -> Finished:
    """Train a group's trials ``together``, or each ``alone``; the exit code must be this one."""
    done = ranks(SCRIPT, how, file, nproc=nproc, env={"AFINA_DISTURB": json.dumps(disturbance)}, check=False)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.tail()}"
    return done


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def masters(run: Path) -> dict[str, torch.Tensor]:
    """Return what the newest checkpoint holds: the fp32 masters and the moments."""
    return load_file(complete(run / "checkpoints")[-1] / "state.safetensors")


def without_times(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in read_metrics(run)]


def status(run: Path) -> str:
    return summary(run)["status"]


def summary(run: Path) -> dict[str, Any]:
    found = read_summary(run)
    assert found is not None, f"{run} has no summary"
    return found


def assert_same_bits(folder: Path, expected: Path, names: Sequence[str]) -> None:
    for name in names:
        found, other = folder / name, expected / name
        assert status(found) == "finished"
        assert without_times(found) == without_times(other), name
        for read in (adapter, masters):
            tensors, others = read(found), read(other)
            assert tensors.keys() == others.keys()
            assert all(torch.equal(tensors[key], others[key]) for key in tensors), name


def assert_as_alone(folder: Path, alone: Path, names: Sequence[str]) -> None:
    """Weights within 1e-5, and the same steps, scores and decisions."""
    for name in names:
        assert worst_distance(adapter(folder / name), adapter(alone / name)) <= 1e-5, name
        found, expected = (read_metrics(where / name) for where in (folder, alone))
        assert [line.keys() for line in found] == [line.keys() for line in expected], name
        for key in ("loss", "eval_loss"):
            values = ([line[key] for line in lines if key in line] for lines in (found, expected))
            assert next(values) == pytest.approx(next(values), rel=1e-5), name
        for key in ("status", "steps", "stopped_by", "stopped_early", "best_step", "skipped_steps"):
            assert summary(folder / name)[key] == summary(alone / name)[key], (name, key)
