"""Out of memory: what is said, and which override takes less; each is tried on the real composition and rules."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.helpers.processes import ROOT, run
from trainer.config import TrainConfig, changed_result_fields, load
from trainer.distributed.process_group import World
from trainer.errors import TrainingError
from trainer.tracking.files import read_summary
from trainer.training.out_of_memory import TRAINING, explain_out_of_memory, next_override, out_of_memory_explained

ASKED = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1 is free."
ON_CPU = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "137438953472 bytes. Error code 12 (Cannot allocate memory)"
)
CPU = World(0, 1, 0, torch.device("cpu"))
GPU = World(0, 1, 0, torch.device("cuda", 0))
GPUS = World(1, 2, 1, torch.device("cuda", 1))
FULL = ["method=full", "rank=null"]
LEAST = ["batch.micro_tokens=1024", "data.max_length=1024"]
WHOLE = [*LEAST, "model.gradient_checkpointing=true"]
ONE_ROW = ["batch.micro_size=1", "model.gradient_checkpointing=true"]


@pytest.mark.parametrize(
    ("overrides", "world", "phase", "expected"),
    [
        ([], GPU, TRAINING, "batch.micro_tokens=2048"),
        (["batch.micro_tokens=1500"], GPU, TRAINING, "batch.micro_tokens=1024"),
        (["batch.micro_size=3"], GPU, TRAINING, "batch.micro_size=1"),
        (LEAST, GPU, TRAINING, "model.gradient_checkpointing=selective"),
        ([*LEAST, "model.gradient_checkpointing=selective"], GPU, TRAINING, "model.gradient_checkpointing=true"),
        ([*LEAST, "method=prefix", "rank=null"], GPU, TRAINING, "zero=stage2_offload"),
        (["batch.micro_size=1"], GPU, TRAINING, "model.gradient_checkpointing=selective"),
        (WHOLE, GPU, TRAINING, "zero=stage2_offload"),
        ([*WHOLE, "zero=stage0"], GPUS, TRAINING, "zero=stage2"),
        ([*WHOLE, "zero=stage1"], GPUS, TRAINING, "zero=stage2"),
        (WHOLE, GPUS, TRAINING, "zero=stage3"),
        ([*ONE_ROW, "model.compile=true"], GPUS, TRAINING, "zero=stage2_offload"),
        ([*WHOLE, "zero=stage3"], GPUS, TRAINING, "zero=stage3_offload"),
        ([*WHOLE, "zero=stage2_offload"], GPUS, TRAINING, "zero=stage3_offload"),
        ([*WHOLE, "zero=stage3_offload"], GPUS, TRAINING, None),
        (WHOLE, CPU, TRAINING, None),
        ([], GPU, "evaluation", "batch.micro_tokens=2048"),
        (LEAST, GPU, "evaluation", "zero=stage2_offload"),
        ([], GPU, "generation", "eval.batch_size=16"),
        (["eval.batch_size=1"], GPU, "generation", "generate.max_new_tokens=32"),
        (["eval.batch_size=1", "generate.max_new_tokens=1"], GPUS, "generation", "zero=stage3"),
        ([], GPU, "building the model", "zero=stage2_offload"),
        ([], GPUS, "building the model", "zero=stage3"),
    ],
)
def test_the_nearest_override_is_accepted_and_changes_no_result(
    overrides: list[str], world: World, phase: str, expected: str | None
) -> None:
    config = load(overrides)
    assert next_override(config, world, phase) == expected
    if expected is None:
        return
    # of a group typed twice the last one counts
    kept = [text for text in overrides if text.partition("=")[0] != expected.partition("=")[0]]
    changed = load([*kept, expected])
    assert changed != config, "it is not what is set already"
    assert changed_result_fields(config, changed) == []


@pytest.mark.parametrize("world", [GPU, GPUS, CPU])
@pytest.mark.parametrize("phase", [TRAINING, "evaluation", "generation", "building the model"])
@pytest.mark.parametrize("start", [["method=dora", "method.bits=4"], FULL, ["method=prefix", "rank=null"]])
def test_one_after_the_other_they_come_to_an_end(start: list[str], phase: str, world: World) -> None:
    """Whoever takes each hint as it comes gets configurations that are accepted, each other than the one before."""
    typed: dict[str, str] = {}
    for _ in range(30):
        config = load([*start, *(f"{key}={value}" for key, value in typed.items())])
        override = next_override(config, world, phase)
        if override is None:
            return
        key, _, value = override.partition("=")
        assert typed.get(key) != value
        typed[key] = value
    pytest.fail(f"no end: {typed}")


def test_on_a_host_beside_a_gpu_nothing_more_is_moved_there() -> None:
    assert next_override(load([]), GPU, TRAINING, beside_gpu=True) is None
    assert next_override(load([]), GPUS, TRAINING, beside_gpu=True) == "zero=stage3"
    offloaded = load(["zero=stage3_offload"])
    assert next_override(offloaded, GPU, TRAINING, beside_gpu=True) == "zero.offload_params=none"


def raised(error: BaseException, module: str = __name__) -> BaseException:
    """The error as it comes out of a function of that module."""
    home = ModuleType(module)
    exec("def fails(error):\n    raise error", home.__dict__)
    try:
        home.fails(error)
    except BaseException as caught:
        return caught
    raise AssertionError


def explained(error: BaseException, config: TrainConfig, world: World = CPU) -> str:
    found = explain_out_of_memory(error, config, world)
    assert isinstance(found, TrainingError)
    assert found.rank == world.rank
    return str(found)


def test_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load([])
    hint = "→ batch.micro_tokens=2048: the result stays the same, and the same command with it resumes"
    assert (
        explained(RuntimeError(ON_CPU), config) == f"out of host memory in training: 128.00 GiB were asked for {hint}"
    )
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 76 * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 77 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("Card", (), {"total_memory": 80 * 2**30}))
    held = "at most 76.00 of 80.00 GiB had been allocated in this process"
    said = explained(torch.OutOfMemoryError(ASKED), config, GPUS)
    assert said == f"out of device memory in training on rank 1: 2.50 GiB were asked for; {held} {hint}"
    said = explained(RuntimeError("CUDA error: out of memory"), config, GPU)
    assert said == f"out of device memory in training: {held} {hint}"
    said = explained(MemoryError("Unable to allocate 512. KiB for an array with shape (65536,)"), config, GPU)
    assert "out of host memory in training: 0.50 MiB were asked for → fewer processes on this host" in said


@pytest.mark.parametrize(
    ("module", "phase", "hint"),
    [
        ("trainer.evaluation.evaluate", "evaluation", "batch.micro_tokens=2048"),
        ("trainer.evaluation.generator", "generation", "eval.batch_size=16"),
        ("trainer.training.build", "building the model", "method.bits=4, which changes the result"),
    ],
)
def test_what_the_run_was_doing_is_told_by_the_stack(module: str, phase: str, hint: str) -> None:
    said = explained(raised(torch.OutOfMemoryError(ASKED), module), load([]))
    assert said.startswith(f"out of device memory in {phase}: ")
    assert hint in said


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (WHOLE, "method.bits=4, which changes the result"),
        ([*WHOLE, "method=qlora"], "a shorter data.max_length or a smaller model"),
        ([*WHOLE, *FULL], "a shorter data.max_length or a smaller model"),
        (["eval.batch_size=1", *WHOLE], "generate.max_new_tokens=32: shorter answers, while training stays the same"),
    ],
)
def test_the_last_way_out_is_said_to_change_the_result(overrides: list[str], said: str) -> None:
    module = "trainer.evaluation.generator" if "eval.batch_size=1" in overrides else __name__
    assert f"→ {said}" in explained(raised(torch.OutOfMemoryError(ASKED), module), load(overrides))


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError(ON_CPU), TrainingError("loss")])
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    assert explain_out_of_memory(error, load([]), CPU) is None
    with pytest.raises(type(error)) as caught, out_of_memory_explained(load([]), CPU):
        raise error
    assert caught.value is error


FAILS = """
import sys
import torch
from trainer.engine.engine import Engine
from trainer.evaluation.generator import Generator
from trainer.train import main

def fails(*_, **__):
    raise torch.OutOfMemoryError(sys.argv[2])

setattr({"accumulate": Engine, "_cut_at_end": Generator}[sys.argv[1]], sys.argv[1], fails)
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "phase", "hint"),
    [("accumulate", "training", "batch.micro_tokens=2048"), ("_cut_at_end", "generation", "eval.batch_size=16")],
)
def test_a_run_ends_with_it(tiny_model: Path, tmp_path: Path, function: str, phase: str, hint: str) -> None:
    del tiny_model
    command = [sys.executable, "-c", FAILS, function, ASKED, "debug=tiny", "run.name=one", "log=off"]
    done = run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == TrainingError.exit_code, done.output
    assert "Traceback" not in done.output
    said = f"out of device memory in {phase}: 2.50 GiB were asked for → {hint}"
    assert done.output.splitlines()[-1].startswith(f"error: {said}")
    summary = read_summary(tmp_path / "runs" / "one")
    assert summary is not None
    assert summary["status"] == "failed"
    assert (summary["error"]["kind"], summary["error"]["rank"]) == ("training", 0)
    assert summary["error"]["message"].startswith(said)
