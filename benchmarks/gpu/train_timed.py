"""Train as ``python -m trainer.train`` does, with each step timed between two synchronisations.

python -m benchmarks.gpu.train_timed [--profile FILE] RESULT.json [overrides]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

import trainer.train
from benchmarks.gpu.measure import IS_CUDA, synchronize
from trainer.distributed.process_group import leave
from trainer.training.loop import Loop

WARM_UP_STEPS = 2
UTILIZATIONS = ("model_flops_utilization", "useful_flops_utilization")
KEPT = ("useful_tokens", "computed_tokens", "loss", "step_seconds", "data_seconds", *UTILIZATIONS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train once and write what the steps took. Returns the training's exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--profile",
        type=Path,
        default=None,
        help="add the last step's kernels to this file, and its trace to its folder",
    )
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args(arguments)
    timer = StepTimer(asked.profile, asked.result.stem)
    timer.install()
    code = trainer.train.main(asked.overrides)
    asked.result.write_text(json.dumps(timer.summary()))
    return code


class StepTimer:
    """Times the steps of the training in this process.

    Args:
        profile_file: where the last step's kernels are written; ``None``: it is timed like the others.
        title: of the profile.
    """

    def __init__(self, profile_file: Path | None, title: str) -> None:
        self.profile_file, self.title = profile_file, title
        self.steps: list[dict[str, Any]] = []
        self.found: dict[str, Any] = {}

    def install(self) -> None:
        """Take the place of ``Loop.step`` in this process."""
        step = Loop.step

        def timed(loop: Loop, number: int) -> Any:
            self.found.setdefault("start_seconds", time.time() - psutil.Process().create_time())
            if IS_CUDA and number == WARM_UP_STEPS:
                torch.cuda.reset_peak_memory_stats()
            synchronize()
            if self.profile_file is not None and number == loop.config.batch.max_steps - 1:
                return self._profile(step, loop, number)
            begin = time.perf_counter()
            result = step(loop, number)
            synchronize()
            seconds = time.perf_counter() - begin
            self.steps.append({name: result.record[name] for name in KEPT} | {"seconds": seconds})
            return result

        Loop.step = timed  # type: ignore[method-assign]

    def _profile(self, step: Any, loop: Loop, number: int) -> Any:
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if IS_CUDA else [])]
        with profile(activities=activities) as profiled:
            result = step(loop, number)
            synchronize()
        assert self.profile_file is not None
        profiled.export_chrome_trace(str(self.profile_file.parent / f"trace-{self.title}.json.gz"))
        average = profiled.key_averages()
        kernels = [event for event in average if str(event.device_type).endswith("CUDA")]
        if kernels:
            self.found["kernel_launches"] = sum(event.count for event in kernels)
            self.found["kernel_seconds"] = sum(event.self_device_time_total for event in kernels) / 1e6
        sort = "self_cuda_time_total" if kernels else "self_cpu_time_total"
        with self.profile_file.open("a") as out:
            for column in dict.fromkeys((sort, "self_cpu_time_total")):
                table = average.table(sort_by=column, row_limit=25, max_name_column_width=120)
                out.write(f"== {self.title}, by {column}\n{table}\n")
        return result

    def summary(self) -> dict[str, Any]:
        """Return times, rates and memory of the steps after the first ones, which warm up."""
        found, timed = dict(self.found), self.steps[WARM_UP_STEPS:] or self.steps
        if timed:
            seconds = sorted(step["seconds"] for step in timed)
            total = sum(seconds)
            found |= {
                "median_step_seconds": seconds[len(seconds) // 2],
                "step_seconds": [round(step["seconds"], 4) for step in self.steps],
                "useful_tokens_per_second": sum(step["useful_tokens"] for step in timed) / total,
                "computed_tokens_per_second": sum(step["computed_tokens"] for step in timed) / total,
                "data_seconds": sum(step["data_seconds"] for step in timed) / len(timed),
                "losses": [round(step["loss"], 5) for step in self.steps],
                **{name: utilization(timed, name) for name in UTILIZATIONS},
            }
        return found | peak_memory()


def utilization(steps: list[dict[str, Any]], name: str) -> float:
    """Return the mean of a utilization over some steps: of the meter, over the time between two synchronisations."""
    return sum(step[name] * step["step_seconds"] for step in steps) / sum(step["seconds"] for step in steps)


def peak_memory() -> dict[str, float]:
    """Return the GPU memory at its peak since the warm-up: in tensors, and held by the allocator."""
    if not IS_CUDA:
        return {}
    return {
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        "alloc_retries": torch.cuda.memory_stats().get("num_alloc_retries", 0),
    }


if __name__ == "__main__":
    leave(main())
