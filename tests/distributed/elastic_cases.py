"""On several ranks: a run that goes on at another number of ranks and another ZeRO stage, from one start to the next.

Arguments: the folder of the cases, the run folder that all starts share, and which start this is.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.distributed.bench import Bench, reference_batches
from tests.helpers.reference import train_reference, worst_distance
from trainer.checkpoint.resume import find_resume_point
from trainer.engine.whole_state import gather_state
from trainer.models.embedded import resolve

METHODS = {
    "lora": ["method=lora"],
    "full": ["method=full"],
    "qlora": ["method=qlora", "model.dtype=fp32"],
}
# (ranks, ZeRO option, steps) of each start.
STARTS = ((1, "stage3", 1), (2, "stage0", 2), (3, "stage2", 3), (1, "stage3_offload", 4), (2, "stage3", 5))


def one_start(bench: Bench, method: str, runs: Path, start: int) -> dict[str, Any] | None:
    """Resume, compare the restored state with what was saved, take a step, save."""
    _, zero, steps = STARTS[start]
    folder = runs / method
    loop = bench.loop(bench.config(f"zero={zero}", "batch.max_steps=5", *METHODS[method]), folder)
    resume = find_resume_point(folder, "auto") if folder.exists() else None
    first = loop.checkpointer.restore(resume).step
    restored = {} if resume is None else gather_state(loop.engine)
    for step in range(first, steps):
        loop.step(step)
    is_saved = loop.checkpointer.save(steps)
    state = gather_state(loop.engine)
    if not bench.world.is_main:
        return None
    kept = runs / f"{method}.pt"
    same = not kept.exists() or _equal(restored, torch.load(kept, weights_only=True))
    torch.save(state, kept)
    found: dict[str, Any] = {"first": first, "saved": is_saved, "same state": same}
    if start == len(STARTS) - 1:
        base = resolve(loop.config.model.name_or_path)
        reference = train_reference(base, loop.config, reference_batches(loop, 5), 5)
        weights = {n.removeprefix("weight/"): t for n, t in state.items() if n.startswith("weight/")}
        found["distance"] = worst_distance(weights, reference)
    return found


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


if __name__ == "__main__":
    runs, start = Path(sys.argv[2]), int(sys.argv[3])
    Bench().record({method: partial(one_start, method=method, runs=runs, start=start) for method in METHODS})
