"""Say what ran out of memory, and which override asks for less without changing the result."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from trainer.config import TrainConfig
from trainer.config.rules.check import check
from trainer.distributed.process_group import World
from trainer.engine.device import peak_memory
from trainer.errors import ConfigError, TrainingError

GIB = 2**30
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": GIB, "TiB": 2**40}
# What torch says where it has no class of its own for it.
HOST_SIGNS = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
GPU_SIGNS = ("CUDA error: out of memory", "CUDA out of memory")
# Innermost first: a function that is on the stack, by its module, and what the run was doing then.
PHASES = {
    "trainer.evaluation.generator": "generation",
    "trainer.evaluation.evaluate": "evaluation",
    "trainer.training.build": "building the model",
}
TRAINING = "training"

Override = tuple[str, dict[str, dict[str, Any]]]  # as it is typed, and the fields that it sets, by section


@contextmanager
def out_of_memory_explained(config: TrainConfig, world: World) -> Iterator[None]:
    """Raise :func:`explain_out_of_memory`'s error where memory runs out inside the ``with`` block."""
    try:
        yield
    except Exception as error:
        if (explained := explain_out_of_memory(error, config, world)) is None:
            raise
        raise explained from error


def explain_out_of_memory(error: BaseException, config: TrainConfig, world: World) -> TrainingError | None:
    """Return the error to show where memory has run out, on the device or on the host; ``None`` for any other error.

    Args:
        error: as it was raised, with its traceback.
        config: of the run.
        world: this process, which is named.
    """
    on_host = isinstance(error, MemoryError) or _says(error, HOST_SIGNS)
    if not (on_host or isinstance(error, torch.OutOfMemoryError) or _says(error, GPU_SIGNS)):
        return None
    phase = _phase(error)
    where = f" on rank {world.rank}" if world.world_size > 1 else ""
    beside_gpu = on_host and world.device.type == "cuda"
    explained = TrainingError(
        f"out of {'host' if on_host else 'device'} memory in {phase}{where}",
        reason="; ".join([*_asked(error), *([] if on_host else _held(world.device))]),
        hint=_hint(config, world, phase, beside_gpu),
    )
    explained.rank = world.rank
    return explained


def next_override(config: TrainConfig, world: World, phase: str, beside_gpu: bool = False) -> str | None:
    """Return the nearest override that takes less memory and leaves what is trained as it is; ``None``: all are set.

    Args:
        config: of the run.
        world: of how many processes it is, and of which device.
        phase: ``TRAINING``, or a value of ``PHASES``.
        beside_gpu: it is the host whose memory has run out, and a GPU computes.
    """
    offers = _on_host(config, world) if beside_gpu else _on_device(config, world, phase)
    return next((text for text, fields in offers if _is_accepted(config, fields)), None)


def _hint(config: TrainConfig, world: World, phase: str, beside_gpu: bool) -> str:
    found = next_override(config, world, phase, beside_gpu)
    if found is not None and found.startswith("generate."):
        return f"{found}: shorter answers, while training stays the same; the same command with it resumes"
    if found is not None:
        return f"{found}: the result stays the same, and the same command with it resumes"
    if beside_gpu:
        return "fewer processes on this host, or a host with more memory"
    fewer_bits = {"method": {"bits": 4}}
    if config.method.name != "full" and config.method.bits > 4 and _is_accepted(config, fewer_bits):
        return "method.bits=4, which changes the result, or a device with more memory"
    return "a shorter data.max_length or a smaller model, which change the result, or a device with more memory"


def _on_device(config: TrainConfig, world: World, phase: str) -> Iterator[Override]:
    """What takes less of the device that computes, nearest first."""
    batch, checkpointing = config.batch, config.model.gradient_checkpointing
    if phase == "generation":
        yield from _halved(config, "eval", "batch_size", 1)
        yield from _halved(config, "generate", "max_new_tokens", 1)
    elif phase in (TRAINING, "evaluation"):
        if batch.micro_size is not None:
            yield from _halved(config, "batch", "micro_size", 1)
        else:
            yield from _halved(config, "batch", "micro_tokens", config.data.max_length)
    if phase == TRAINING:
        for value, before in (("selective", (False,)), ("true", (False, "selective"))):
            fields = {"model": {"gradient_checkpointing": True if value == "true" else value}}
            if checkpointing in before:
                yield f"model.gradient_checkpointing={value}", fields
    yield from _split(config, world)


def _split(config: TrainConfig, world: World) -> Iterator[Override]:
    """What splits over the devices, or moves to the host, what is held there whatever the batch."""
    zero, several = config.zero, world.world_size > 1
    stays = zero.offload_optimizer == "none"
    if several and zero.stage < 2:
        yield "zero=stage2", {"zero": {"stage": 2}}
    if several and zero.stage < 3 and stays:
        yield "zero=stage3", {"zero": {"stage": 3}}
    if world.device.type == "cpu":  # its memory is the host's
        return
    if zero.stage < 3 and stays:
        yield "zero=stage2_offload", {"zero": {"stage": 2, "offload_optimizer": "cpu"}}
    if zero.stage < 3 or stays or zero.offload_params == "none":
        yield "zero=stage3_offload", {"zero": {"stage": 3, "offload_optimizer": "cpu", "offload_params": "cpu"}}


def _on_host(config: TrainConfig, world: World) -> Iterator[Override]:
    """What takes less of a host whose GPU computes."""
    for name in ("offload_params", "offload_optimizer"):
        if getattr(config.zero, name) == "cpu":
            yield f"zero.{name}=none", {"zero": {name: "none"}}
    if world.world_size > 1 and config.zero.stage < 3:
        yield "zero=stage3", {"zero": {"stage": 3}}


def _halved(config: TrainConfig, section: str, name: str, least: int) -> Iterator[Override]:
    now = getattr(getattr(config, section), name)
    if now > least:
        value = max(now // 2, least)
        yield f"{section}.{name}={value}", {section: {name: value}}


def _is_accepted(config: TrainConfig, fields: dict[str, dict[str, Any]]) -> bool:
    """Return whether the rules allow it beside the rest: no hint may lead to an error."""
    changed = {section: replace(getattr(config, section), **values) for section, values in fields.items()}
    try:
        check(replace(config, **changed))
    except ConfigError:
        return False
    return True


def _says(error: BaseException, signs: tuple[str, ...]) -> bool:
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _phase(error: BaseException) -> str:
    modules = {frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)}
    return next((phase for module, phase in PHASES.items() if module in modules), TRAINING)


def _asked(error: BaseException) -> list[str]:
    """How much was asked for, where the message tells."""
    found = re.search(r"to allocate ([\d.]+) (bytes|[KMGT]iB)", str(error))
    if found is None:
        return []
    size = float(found[1]) * UNITS[found[2]]
    return [f"{size / GIB:.2f} GiB were asked for" if size >= GIB / 100 else f"{size / 2**20:.2f} MiB were asked for"]


def _held(device: torch.device) -> list[str]:
    """How much this process has held of the device at most, and how much there is."""
    if device.type != "cuda":
        return []
    peak, total = peak_memory(device)["peak_memory_bytes"], torch.cuda.get_device_properties(device).total_memory
    return [f"at most {peak / GIB:.2f} of {total / GIB:.2f} GiB had been allocated in this process"]
