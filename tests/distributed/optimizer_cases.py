"""On two ranks: every optimizer under every option of ``zero`` that is not refused.

Each cell is trained for five steps, with clipping and decay, and compared with its own library in one plain process:
stock transformers and PEFT, and the optimizer of torch, bitsandbytes or transformers made by hand. Where the optimizer
makes much of the rounding of a gradient, that process takes the reduced gradients of the run, before clipping. From a
checkpoint behind the third step the last two are taken twice more: by the same engine, which goes back, and by one that
knows nothing.

AdamW is not here: its cells are those of ``method_cases.py``, and of ``checkpoint_cases.py``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import DEFAULT, patch

import torch
from torch import Tensor, nn

from tests.distributed.bench import STEPS, Bench, gather_weights, reference_batches
from tests.helpers.plain_optimizers import PLAIN, FlatShares, plain_optimizer
from tests.helpers.reference import mean_loss, reference_model, worst_distance
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.resume import find_resume_point
from trainer.config import TrainConfig
from trainer.config.rules.optimizers import optimizer_cells, optimizer_refusal
from trainer.distributed.process_group import gather_objects
from trainer.engine.whole_state import EngineTensors, gather_live, gather_state
from trainer.errors import CheckpointError
from trainer.models.embedded import resolve
from trainer.training.loop import Loop

COMMON = ["data.max_length=400", "batch.micro_tokens=400", "batch.packing=padded", "schedule=constant"]
ADAM = ["optim.beta2=0.99"]
OF_OPTIMIZER = {
    "adamw_8bit": ADAM,
    "paged_adamw_8bit": ADAM,
    "adafactor": ["optim.eps=1e-8"],
    "muon": ADAM,
    "lion": ["optim.eps=1e-8", "optim.learning_rate=0.001"],
}
OF_METHOD = {
    "lora": ["method=lora", "method.r=8"],
    "full": ["method=full", "rank=null", "optim.decay_biases_and_norms=true"],
    "adalora": ["method=adalora", "method.init_r=4", "method.target_r=2", "method.tinit=1", "method.tfinal=1",
                "method.deltaT=1"],
}  # fmt: skip
MORE = (("adalora", "lion stage2"), ("adalora", "adamw_8bit stage0"), ("adalora", "muon stage0"),
        ("adalora", "adafactor stage0"), ("full", "muon stage0"), ("full", "lion stage3"),
        ("full", "adamw_8bit stage0"), ("full", "adamw_8bit stage2"), ("full", "adafactor stage0"))  # fmt: skip
RESUMED_AT = 3


def list_cells() -> dict[str, list[str]]:
    """Overrides of every cell that works, with LoRA, and of some with other methods, by the cell's name."""
    every = optimizer_cells().items()
    works = [f"{n} {zero}" for (n, zero), cell in every if n != "adamw" and optimizer_refusal(cell) is None]
    out = {cell: ("lora", cell) for cell in works} | {f"{cell} {method}": (method, cell) for method, cell in MORE}
    return {
        case: [*COMMON, f"zero={cell.split()[1]}", f"optim.name={cell.split()[0]}", *OF_METHOD[method]]
        + OF_OPTIMIZER[cell.split()[0]]
        for case, (method, cell) in out.items()
    }


def is_amplified(case: str) -> bool:
    """Whether the plain process takes the run's gradients: Muon's products in bf16 and codes of 8 bits turn with their
    last bits."""
    name, zero, *method = case.split()
    return name == "muon" or ("8bit" in name and (zero != "stage0" or method == ["full"]))


def train_cell(bench: Bench, case: str, overrides: list[str]) -> dict[str, Any] | None:
    """Train, go back, resume; distances on rank 0."""
    folder = bench.shared_folder()
    config = bench.config(*overrides)
    loop = start(bench, config, folder)
    plain = Plain(config, loop, bench.world.world_size) if is_amplified(case) else None
    for step in range(STEPS):
        with plain.beside(loop) if plain else nullcontext():
            loop.step(step)
        if step + 1 == RESUMED_AT:
            assert loop.checkpointer.save(RESUMED_AT)
    weights, expected = gather_weights(loop), gather_everything(loop)
    same = {}
    fresh = start(bench, config, folder)
    for name, other in {"gone back": loop, "resumed": fresh}.items():
        assert other.checkpointer.restore(find_resume_point(folder, "auto")).step == RESUMED_AT
        for step in range(RESUMED_AT, STEPS):
            other.step(step)
        found = gather_everything(other)
        same[name] = found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)
    if not bench.world.is_main:
        return None
    distance = worst_distance(weights, plain.weights() if plain else reference(config, loop))
    return {"update": distance, **same, "tensors": len(expected)}


def start(bench: Bench, config: TrainConfig, folder: Any) -> Loop:
    """On a CPU, where bitsandbytes does all of a paged optimizer but the pages."""
    with patch("trainer.training.build.check_device"):
        return bench.loop(config, folder)


def gather_everything(loop: Loop) -> dict[str, Tensor]:
    live = {f"live/{n}": t for n, t in gather_live(loop.engine, only_trainable=True).items()}
    return {**gather_state(loop.engine), **live}


class Plain:
    """The optimizer in one process, fed with the run's reduced gradients; under ZeRO 1 to 3 on the shares that it cuts,
    for moments in 8 bits have their scales there."""

    def __init__(self, config: TrainConfig, loop: Loop, world_size: int) -> None:
        self.config, self.run = config, EngineTensors(loop.engine)
        self.trained = {name: nn.Parameter(self.run.weight(name).clone()) for name in self.run.names()}
        tensors, stage = list(self.trained.values()), config.zero.stage
        self.shares = FlatShares(tensors, world_size, stage) if stage else None
        self.optimizers = plain_optimizer(config.optim, self.trained, self.shares)

    @contextmanager
    def beside(self, loop: Loop) -> Iterator[None]:
        """Step whenever the run does, just before."""
        with patch.object(loop.engine, "update", wraps=loop.engine.update) as update:
            update.side_effect = self.step
            yield
        for name in (n for n in self.trained if "lora_E" in n):  # ranks that AdaLoRA has taken
            self.trained[name].data.mul_(self.run.weight(name) != 0)

    def step(self, learning_rate: float) -> Any:
        for name, parameter in self.trained.items():
            parameter.grad = self.run.gradient(name)
        torch.nn.utils.clip_grad_norm_(self.trained.values(), self.config.optim.max_grad_norm)
        if self.shares:
            self.shares.take_gradients()
        step_all(self.optimizers, learning_rate)
        if self.shares:
            self.shares.give_weights()
        return DEFAULT  # what the run's own returns

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.trained.items()}


def step_all(optimizers: list[torch.optim.Optimizer], learning_rate: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()


def reference(config: TrainConfig, loop: Loop) -> dict[str, Tensor]:
    """The trained tensors of one plain process."""
    model = reference_model(resolve(config.model.name_or_path), config, STEPS)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizers = plain_optimizer(config.optim, trained, None)
    warmup = math.ceil(config.schedule.warmup_ratio * STEPS)
    model.train()
    for step, examples in enumerate(reference_batches(loop)):
        mean_loss(model, examples).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), config.optim.max_grad_norm)
        step_all(optimizers, config.optim.learning_rate * min(1.0, (step + 1) / warmup))
        if config.method.name == "adalora":
            model.base_model.update_and_allocate(step + 1)
        model.zero_grad()
    return {name: p.detach().clone() for name, p in trained.items()}


def transfer(bench: Bench, name: str, stages: list[str]) -> dict[str, Any]:
    """A checkpoint under one stage, restored under each of the others: how far the state is from what was saved."""
    folder = bench.shared_folder()
    overrides = [*COMMON, *OF_METHOD["lora"], f"optim.name={name}", *OF_OPTIMIZER[name]]
    first = bench.loop(bench.config(*overrides, f"zero={stages[0]}"), folder)
    for step in range(RESUMED_AT):
        first.step(step)
    assert first.checkpointer.save(RESUMED_AT)
    expected, seen = gather_state(first.engine), {}
    for zero in stages[1:]:
        other = bench.loop(bench.config(*overrides, f"zero={zero}"), folder)
        other.checkpointer.restore(find_resume_point(folder, "auto"))
        found = gather_state(other.engine)
        if bench.world.is_main:
            masters = {n for n in expected if n.startswith("weight/")}
            moments = {n: t for n, t in expected.items() if n not in masters and t.norm() > 0}
            seen[zero] = {
                "weights": all(torch.equal(found[n], expected[n]) for n in masters),
                "moments": worst_distance({n: found[n] for n in moments}, moments),
            }
        other.step(RESUMED_AT)  # and it trains on
    return seen


def refused(bench: Bench) -> dict[str, list[str]]:
    """A checkpoint of one optimizer, resumed with another; one of before there was a choice, with AdamW."""
    folder = bench.shared_folder()
    overrides = [*COMMON, *OF_METHOD["lora"], "zero=stage0"]
    first = bench.loop(bench.config(*overrides), folder)
    del first.checkpointer.run_identity["optim.name"]
    first.step(0)
    assert first.checkpointer.save(1)
    said: dict[str, Any] = {}
    for name in PLAIN:
        other = start(bench, bench.config(*overrides, f"optim.name={name}", *OF_OPTIMIZER.get(name, [])), folder)
        said[name] = gather_objects(_restore(other.checkpointer, folder))
    return said


def _restore(checkpointer: Checkpointer, folder: Any) -> str:
    try:
        checkpointer.restore(find_resume_point(folder, "auto"))
    except CheckpointError as error:
        return str(error)
    return ""


TRANSFERRED = {"lion": ["stage2", "stage0", "stage3"], "adamw_8bit": ["stage2", "stage1", "stage0", "stage3_offload"]}
CASES = {
    **{case: partial(train_cell, case=case, overrides=overrides) for case, overrides in list_cells().items()},
    **{f"{name} elsewhere": partial(transfer, name=name, stages=stages) for name, stages in TRANSFERRED.items()},
    "refused": refused,
}

if __name__ == "__main__":
    chosen = sys.argv[2].split(",") if len(sys.argv) > 2 else list(CASES)
    Bench().record({name: CASES[name] for name in chosen})
