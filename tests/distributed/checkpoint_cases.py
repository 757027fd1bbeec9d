"""On two ranks: runs resumed from a checkpoint, at the same ZeRO stage and at others; a full disk."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tests.distributed.bench import Bench, save_mixtures
from tests.helpers.logged import logged_lines
from tests.helpers.new_tokens import NEW
from trainer.checkpoint.resume import find_resume_point
from trainer.distributed.process_group import barrier, gather_objects
from trainer.engine.whole_state import gather_live, gather_state
from trainer.errors import CheckpointError
from trainer.training.loop import Loop

NO_DROPOUT = ("full", "ia3", "prompt", "prefix", "bottleneck", "experts")
PARTITION_ALL = "zero.extra.zero_optimization.stage3_param_persistence_threshold=0"
OLDER = ("stage0", "stage2", "stage3")
OTHER_STAGES = ("stage0", "stage1", "stage3", "stage2_offload", "stage3_offload")
RESUMED = [
    *([zero] for zero in ("stage0", "stage1", "stage2", "stage3")),
    *([zero, "method=full"] for zero in ("stage0", "stage2", "stage3")),
    *([zero, "model.dtype=bf16"] for zero in ("stage0", "stage2", "stage3")),
    # AdaLoRA takes its first ranks before the checkpoint, and more behind it.
    *([zero, "method=adalora", "method.tinit=1", "method.tfinal=1"] for zero in ("stage0", "stage2", "stage3")),
    *(["stage2", f"method={method}"] for method in ("dora", "ia3", "prompt", "prefix", "bottleneck")),
    ["stage2", "method=lora", "method.init=pissa"],
    *([zero, "optim.lora_plus_ratio=16", "model.neftune_alpha=5"] for zero in ("stage1", "stage3")),
    ["stage2", "method=full", "model.neftune_alpha=5", "optim.name=adamw_8bit"],
    ["stage3", "optim.lora_plus_ratio=4", "optim.name=lion", "optim.eps=1e-8"],
    *([zero, "method=experts", "method.target_modules=[o_proj]"] for zero in ("stage0", "stage2")),
    ["stage3", "method=experts", "method.target_modules=[o_proj]", PARTITION_ALL],
    ["stage2", NEW, "method.trainable_tokens=new"],
    *([zero, NEW, "method.modules_to_save=[embed_tokens,lm_head]"] for zero in ("stage0", "stage3")),
    *([zero, "model.kernels=[varlen,lora]", "model.gradient_checkpointing=true"] for zero in ("stage2", "stage3")),
]


def resume_is_bit_identical(bench: Bench, zero: str, overrides: list[str]) -> dict[str, Any]:
    """Six steps at once against three, a checkpoint, and three more in an engine that knows nothing."""
    folder = bench.shared_folder()
    has_dropout = not any(each.removeprefix("method=") in NO_DROPOUT for each in overrides)
    dropout = ["method.dropout=0.1"] if has_dropout else []
    base = [f"model.name_or_path={save_mixtures(bench, ['olmoe'])}/olmoe"] if "method=experts" in overrides else []
    config = bench.config(f"zero={zero}", "batch.max_steps=6", "batch.micro_size=3", *overrides, *dropout, *base)
    straight = bench.loop(config, folder)
    for step in range(3):
        straight.step(step)
    assert straight.checkpointer.save(3)
    for step in range(3, 6):
        straight.step(step)
    expected = _gather_everything(straight)

    again = bench.loop(config, folder)
    first = again.checkpointer.restore(find_resume_point(folder, "auto")).step
    for step in range(first, 6):
        again.step(step)
    found = _gather_everything(again)
    identical = set(found) == set(expected) and all(torch.equal(found[n], expected[n]) for n in expected)
    return {"first step": first, "identical": identical, "tensors": len(expected)}


def _gather_everything(loop: Loop) -> dict[str, Tensor]:
    live = {f"live/{n}": t for n, t in gather_live(loop.engine, only_trainable=True).items()}
    ranks = {f"ranks/{n}": t for n, t in loop.engine.runtime.state().items()}
    return {**gather_state(loop.engine), **live, **ranks}


def resume_at_other_stages(bench: Bench) -> dict[str, Any]:
    """The state, to the bit, in an engine of another ZeRO stage; another seed is refused."""
    folder = bench.shared_folder()
    first = bench.loop(bench.config("zero=stage2"), folder)
    for step in range(2):
        first.step(step)
    first.checkpointer.save(2)
    expected = gather_state(first.engine)
    seen: dict[str, Any] = {}
    for zero in OTHER_STAGES:
        other = bench.loop(bench.config(f"zero={zero}"), folder)
        other.checkpointer.restore(find_resume_point(folder, "auto"))
        found = gather_state(other.engine)
        seen[zero] = all(torch.equal(found[n], expected[n]) for n in expected)
    wrong = bench.loop(bench.config("run.seed=5"), folder)
    try:
        wrong.checkpointer.restore(find_resume_point(folder, "auto"))
    except CheckpointError as error:
        seen["another seed"] = str(error)
    return seen


def one_rank_cannot_write(bench: Bench) -> list[dict[str, Any]]:
    """Rank 1's disk is full: every rank hears of it, the run goes on, and the next checkpoint is there."""
    folder = bench.shared_folder()
    loop = bench.loop(bench.config("method=full", "zero=stage2"), folder)
    full = OSError(errno.ENOSPC, "No space left on device")
    with logged_lines() as logged:
        loop.step(0)
        with (
            patch("trainer.checkpoint.tensors.save_file", side_effect=full) if bench.world.rank == 1 else nullcontext()
        ):
            lost = loop.checkpointer.save(1)
        loop.step(1)
        kept = loop.checkpointer.save(2)
    there = sorted(path.name for path in (folder / "checkpoints").iterdir())
    return gather_objects({"saved": [lost, kept], "logged": logged, "there": there})


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('code of a checkpoint was run')",)


def older_full_checkpoint_is_read_as_data(bench: Bench, zero: str) -> dict[str, Any]:
    """What 0.1 saved of all weights, DeepSpeed's own files: with a word of trust, as data, and else not."""
    folder = bench.shared_folder()
    overrides = ("method=full", "rank=null", f"zero={zero}")
    old = bench.loop(bench.config(*overrides), folder)
    for step in range(2):
        old.step(step)
    old.checkpointer.save(2)
    checkpoint = folder / "checkpoints" / "step-00000002"
    old.engine.deepspeed.save_checkpoint(str(checkpoint / "deepspeed"), tag="state")
    said = []
    with_trust = bench.loop(bench.config(*overrides, "checkpoint.trust_pickle=true"), folder)
    with_trust.checkpointer.restore(checkpoint)
    for loop in (old, with_trust):
        loop.step(2)
    expected, found = gather_state(old.engine), gather_state(with_trust.engine)
    without = bench.loop(bench.config(*overrides), folder)
    barrier()
    if bench.world.is_main:
        for file in (checkpoint / "deepspeed" / "state").glob("*.pt"):
            torch.save({"module": _Bomb()}, file)
    barrier()
    for loop in (without, with_trust):
        try:
            loop.checkpointer.restore(checkpoint)
        except CheckpointError as error:
            said.append(str(error))
    return {"equal": all(torch.equal(found[n], expected[n]) for n in expected), "said": gather_objects(said)}


CASES: dict[str, Callable[[Bench], Any]] = {
    **{
        f"resume {' '.join(each)}": partial(resume_is_bit_identical, zero=each[0], overrides=each[1:])
        for each in RESUMED
    },
    "other stages": resume_at_other_stages,
    **{f"older {zero}": partial(older_full_checkpoint_is_read_as_data, zero=zero) for zero in OLDER},
    "full disk on rank 1": one_rank_cannot_write,
}


if __name__ == "__main__":
    Bench().record(CASES)
