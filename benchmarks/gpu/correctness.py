"""Train the tiny model on the GPU in every way, and once each way on the CPU, and compare what was trained.

python -m benchmarks.gpu.correctness WORK [--workers 8] [--seconds 150] [--only lora,same]

Without a GPU everything runs on the CPU, and in fp32, where all ways must agree: that tries the plumbing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from benchmarks.gpu.collect import choices_in
from benchmarks.gpu.measure import IS_CUDA, emit, relative_distance

WHAT = "training of the tiny model"
HALF = "bf16" if IS_CUDA else "fp32"
# What model.kernels=auto takes on a GPU, and the same without varlen; on a CPU what runs there.
KERNELS = "auto" if IS_CUDA else "[varlen,lora,rms_norm]"
SDPA = "[lora,swiglu,rope,rms_norm]" if IS_CUDA else "[lora,rms_norm]"
BASE = (
    *("debug=tiny", "log=off", "data.validation=0", "data.max_rows=160", "batch.max_steps=5", "batch.global_size=16"),
    *("schedule=constant", "schedule.warmup_ratio=0", "optim.learning_rate=1e-3", "checkpoint.every_steps=0"),
    *("eval.before=false", "eval.metrics=[loss]", "run.overwrite=true"),
)
# Runs that are repeated and resumed.
LONGER = (
    *("data.max_rows=512", "batch.max_steps=8", "batch.global_size=64", "checkpoint.every_steps=4"),
    *("checkpoint.keep=5", f"model.dtype={HALF}", "zero=stage2"),
)
REPEATED = (("same", LONGER, False), ("deterministic", (*LONGER, "run.deterministic=true"), True))


@dataclass(frozen=True, slots=True)
class Case:
    """A training: its overrides, where it runs, the case that it must agree with, and whether to the bit."""

    overrides: tuple[str, ...]
    on_gpu: bool = True
    against: str | None = None
    to_the_bit: bool = False


@dataclass(frozen=True, slots=True)
class Finished:
    """How a case ended, and all that it printed."""

    code: int
    seconds: float
    text: str


def cases() -> dict[str, Case]:
    """Return every case that starts from the base, by name."""
    found: dict[str, Case] = {}
    for method in ("lora", "full", "qlora", "qlora_8bit"):
        plain = (f"method={method}", "zero=stage0", "model.kernels=none", "batch.packing=padded")
        found[f"cpu_{method}"] = Case(plain, on_gpu=False)
    lora = ("stage0", "stage1", "stage2", "stage3", "stage2_offload", "stage3_offload")
    for method, zero in (*(("lora", zero) for zero in lora), ("full", "stage2"), ("full", "stage3")):
        found[f"gpu_{method}_{zero}"] = Case((f"method={method}", f"zero={zero}"), against=f"cpu_{method}")
    for method in ("qlora", "qlora_8bit"):  # bitsandbytes rounds otherwise on a GPU, and multiplies in 8 bits
        plain = (f"method={method}", "zero=stage0", "model.kernels=none", "batch.packing=padded")
        found[f"gpu_{method}_plain"] = Case(plain, against=f"cpu_{method}")
        found[f"gpu_{method}_stage2"] = Case((f"method={method}", "zero=stage2"), against=f"gpu_{method}_plain")
    stage2 = ("method=lora", "zero=stage2")
    found["gpu_lora_padded"] = Case((*stage2, "batch.packing=padded"), against="cpu_lora")
    found["gpu_lora_no_kernels"] = Case((*stage2, "model.kernels=none"), against="cpu_lora")
    for setting in ("true", "selective"):
        checkpointed = (*stage2, f"model.gradient_checkpointing={setting}")
        found[f"gpu_lora_checkpointing_{setting}"] = Case(checkpointed, against="cpu_lora")
    half = (*stage2, f"model.dtype={HALF}")
    found["gpu_lora_half_no_kernels"] = Case((*half, "model.kernels=none"), against="cpu_lora")
    for name, kernels in (("auto", KERNELS), ("sdpa", SDPA)):
        found[f"gpu_lora_half_{name}"] = Case((*half, f"model.kernels={kernels}"), against="gpu_lora_half_no_kernels")
    for name, overrides, to_the_bit in REPEATED:
        found[f"{name}_a"] = Case(overrides)
        found[f"{name}_b"] = Case(overrides, against=f"{name}_a", to_the_bit=to_the_bit)
    return found


def resumed_cases(work: Path, done: dict[str, Finished]) -> dict[str, Case]:
    """Return the cases that resume from half way of one that has finished."""
    found: dict[str, Case] = {}
    for name, overrides, to_the_bit in REPEATED:
        if name + "_a" in done and done[name + "_a"].code == 0:
            checkpoint = work / "runs" / f"{name}_a" / "checkpoints" / "step-00000004"
            resumed = (*overrides, f"checkpoint.resume={checkpoint}")
            found[f"{name}_resumed"] = Case(resumed, against=f"{name}_a", to_the_bit=to_the_bit)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and compare the cases. Returns 1 where one failed or is not to the bit what it must be, else 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path, help="a folder for the runs and their logs")
    parser.add_argument("--workers", type=int, default=8, help="trainings at a time")
    parser.add_argument("--seconds", type=float, default=150, help="of this process, after which no training goes on")
    parser.add_argument("--only", default="", help="parts of the names of the cases to run, separated by commas")
    asked = parser.parse_args(arguments)
    asked.work.mkdir(parents=True, exist_ok=True)
    deadline = psutil.Process().create_time() + asked.seconds  # imports can take long where nothing is cached
    parts = asked.only.split(",")
    chosen = {name: case for name, case in cases().items() if any(part in name for part in parts)}
    done = run_all(asked.work, chosen, asked.workers, deadline)
    resumed = resumed_cases(asked.work, done)
    done |= run_all(asked.work, resumed, asked.workers, deadline)
    found = {name: describe(asked.work, name, case, done) for name, case in {**chosen, **resumed}.items()}
    for name, values in found.items():
        emit("correct", WHAT, run=name, **values)
    return int(any(values["code"] or values.get("broken") for values in found.values()))


def run_all(work: Path, chosen: dict[str, Case], workers: int, deadline: float) -> dict[str, Finished]:
    """Run some cases, several at a time."""
    with ThreadPoolExecutor(workers) as pool:
        finished = pool.map(lambda item: run(work, *item, deadline), chosen.items())
        return dict(zip(chosen, finished, strict=True))


def run(work: Path, name: str, case: Case, deadline: float) -> Finished:
    """Train one case in a process of its own, which is killed at the deadline."""
    begin, log = time.time(), work / f"{name}.log"
    if deadline - begin < 5:
        return Finished(-1, 0.0, "no time left")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not case.on_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "trainer.train", *BASE]
    command += [f"run.dir={work / 'runs'}", f"run.name={name}", *case.overrides]
    with log.open("w") as out:
        try:
            stop = deadline - begin
            code = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, timeout=stop
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
    return Finished(code, time.time() - begin, log.read_text(errors="replace"))


def describe(work: Path, name: str, case: Case, done: dict[str, Finished]) -> dict[str, Any]:
    """Return how a case ended and how far what it trained is from the case that it must agree with."""
    mine = done[name]
    lines = [line for line in mine.text.splitlines() if line.strip()]
    found: dict[str, Any] = {"code": mine.code, "seconds": mine.seconds, **choices_in(lines)}
    if mine.code:
        return {**found, "tail": " | ".join(lines)[-600:]}
    if case.against in done and done[case.against].code == 0:
        found |= {"against": case.against, **compare(trained(work, name), trained(work, case.against))}
        if case.to_the_bit and not found["same_to_the_bit"]:
            found["broken"] = "the same bits are promised"
    return found


def trained(work: Path, name: str) -> dict[str, torch.Tensor]:
    """Return what a finished run has trained: its adapter, or the whole model."""
    folder = work / "runs" / name
    files = [*folder.glob("adapter/adapter_model.safetensors"), *folder.glob("model/*.safetensors")]
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return the largest relative distance of a tensor, and whether all are the same to the bit."""
    assert found.keys() == expected.keys(), f"other tensors: {sorted(found.keys() ^ expected.keys())[:5]}"
    return {
        "far": max(relative_distance(found[name], expected[name]) for name in expected),
        "same_to_the_bit": all(torch.equal(found[name], expected[name]) for name in expected),
    }


if __name__ == "__main__":
    sys.exit(main())
