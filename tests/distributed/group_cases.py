"""On two ranks: parameter groups with rates and decays of their own, under every ZeRO stage, against one plain process;
and a run that was begun when everything decayed.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.distributed.bench import Bench, gather_weights, reference_batches
from tests.helpers.reference import train_reference, worst_distance
from trainer.checkpoint.resume import find_resume_point
from trainer.checkpoint.run_folder import Run
from trainer.engine.whole_state import gather_state
from trainer.models.embedded import resolve
from trainer.training.job import open_loop
from trainer.training.loop import Loop

ZERO = ("stage0", "stage1", "stage2", "stage3")
# B takes 16 times the rate: at 0.01 five steps of the tiny model would amplify rounding itself to 2e-4.
LORA_PLUS = ("optim.lora_plus_ratio=16", "optim.learning_rate=0.001")
OPTIONS: dict[str, list[str]] = {
    # COMMON decays by 0.1, and clips: the norm is of all groups together. method_cases.py spares at every stage.
    "spared": ["method=full"],
    "all decay": ["method=full", "optim.decay_biases_and_norms=true"],
    "lora+": [*LORA_PLUS],
    "lora+ dora": [*LORA_PLUS, "method.dora=true"],
    "lora+ embeddings": [*LORA_PLUS, "method.target_modules=[q_proj,embed_tokens]"],
    "wsd": ["schedule=wsd", "schedule.decay_ratio=0.6", "schedule.decay_shape=1-sqrt", "schedule.min_ratio=0.2"],
}
FEW = {"spared": ("stage1",), "all decay": ("stage2",), "lora+ dora": ("stage3",), "lora+ embeddings": ("stage3",),
       "wsd": ("stage2",)}  # fmt: skip
GROUPS = {"spared": 2, "lora+": 2, "lora+ dora": 2, "lora+ embeddings": 3}


def cases() -> list[tuple[str, str]]:
    """Return the options and the stages that each is tried under."""
    return [(option, zero) for option in OPTIONS for zero in FEW.get(option, ZERO)]


class Groups:
    """Train each option and compare it with the plain process; one reference for all stages of one."""

    def __init__(self) -> None:
        self.references: dict[str, dict[str, Tensor]] = {}

    def __call__(self, bench: Bench, option: str, zero: str) -> float | None:
        loop = bench.loop(bench.config(f"zero={zero}", *OPTIONS[option]))
        assert len(loop.engine.optimizer.param_groups) == GROUPS.get(option, 1)
        for step in range(5):
            loop.step(step)
        found = gather_weights(loop)
        if not bench.world.is_main:
            return None
        if option not in self.references:
            base = resolve(loop.config.model.name_or_path)
            self.references[option] = train_reference(base, loop.config, reference_batches(loop), 5)
        return worst_distance(found, self.references[option])


def a_run_goes_on_as_it_began(bench: Bench, zero: str, began: str, then: str) -> dict[str, bool]:
    """Begun with one value of the key, three steps, and resumed with another in an engine that knows nothing."""
    folder = bench.shared_folder()
    common = [f"zero={zero}", "method=full", "batch.max_steps=6"]
    first = bench.loop(bench.config(*common, f"optim.decay_biases_and_norms={began}"), folder)
    for step in range(3):
        first.step(step)
    first.checkpointer.save(3)
    job, built = bench.job(bench.config(*common, f"optim.decay_biases_and_norms={then}"), folder)
    job = replace(job, run=Run(folder, resume_from=find_resume_point(folder, "auto")))
    again, restored = open_loop(job, built, Loop)
    assert restored.step == 3
    return {"decays_all": again.engine.decays_all, "equal": _same_rest(first, again)}


def _same_rest(one: Loop, other: Loop) -> bool:
    for step in range(3, 6):
        one.step(step)
        other.step(step)
    a, b = gather_state(one.engine), gather_state(other.engine)
    return all(torch.allclose(a[n], b[n], rtol=1e-6, atol=1e-7) for n in a)


def state_moves_to_other_stages(bench: Bench) -> dict[str, bool]:
    """The state of two groups, to the bit."""
    folder, seen = bench.shared_folder(), {}
    first = bench.loop(bench.config("zero=stage2", "method=full"), folder)
    for step in range(2):
        first.step(step)
    first.checkpointer.save(2)
    expected = gather_state(first.engine)
    for zero in ("stage0", "stage1", "stage3"):
        other = bench.loop(bench.config(f"zero={zero}", "method=full"), folder)
        other.checkpointer.restore(find_resume_point(folder, "auto"))
        found = gather_state(other.engine)
        seen[zero] = all(torch.equal(found[n], expected[n]) for n in expected)
    return seen


RESUMED = (("stage2", "true", "null"), ("stage3", "true", "null"), ("stage2", "true", "false"))


if __name__ == "__main__":
    groups = Groups()
    all_cases: dict[str, Any] = {f"{o} {zero}": partial(groups, option=o, zero=zero) for o, zero in cases()}
    for zero, began, then in RESUMED:
        resumed = partial(a_run_goes_on_as_it_began, zero=zero, began=began, then=then)
        all_cases[f"resumed {zero} {began} {then}"] = resumed
    Bench().record({**all_cases, "other stages": state_moves_to_other_stages})
