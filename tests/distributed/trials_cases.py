"""On one and on two ranks: several trials on one engine, each against a plain process and a run of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.distributed.bench import STEPS, Bench, gather_weights, reference_batches
from tests.helpers.reference import trained_reference, worst_distance
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.config import TrainConfig
from trainer.distributed.process_group import gather_objects
from trainer.engine.engine import Update
from trainer.engine.learning_rate import learning_rate
from trainer.engine.whole_state import StateOwner, gather_live, gather_state
from trainer.kernels.label_loss import LabelLoss
from trainer.kernels.trial_lora import ActiveTrials, patch_trial_linears
from trainer.methods.attach import attach_trials
from trainer.models.embedded import resolve
from trainer.models.loading import compute_dtype, load_model
from trainer.together.engine import TrialsEngine
from trainer.together.trial_view import view_trial
from trainer.training.loop import Loop

ZERO = ("stage0", "stage1", "stage2", "stage3")
TRIALS: dict[str, list[str]] = {
    "trial_0": ["method.r=4", "optim.max_grad_norm=0.1"],
    "trial_1": ["method.r=8", "optim.max_grad_norm=1", "optim.learning_rate=0.003", "optim.beta1=0.8",
                "optim.beta2=0.99", "optim.weight_decay=0"],
    "trial_2": ["method.r=2", "optim.max_grad_norm=0", "method.rslora=true", "method.seed=7",
                "method.target_modules=[q_proj,v_proj]"],
    "trial_3": ["method.r=4", "optim.learning_rate=0.02"],
}  # fmt: skip
SEVERAL_SHARES = ("zero.extra={zero_optimization: {sub_group_size: 3000}}",)  # of a trial, as of a large model's
WEIGHT = "weight/"


class Group:
    """The trials on one engine, and what makes their batches."""

    def __init__(self, bench: Bench, configs: Mapping[str, TrainConfig], lone: Loop) -> None:
        self.world, self.configs, self.loader = bench.world, configs, lone.loader
        config = lone.config
        dtype = compute_dtype(config.model.dtype, bench.world.device, config.zero.stage)
        base = load_model(resolve("tiny"), config.model, config.method, dtype, bench.world.device, config.zero.stage)
        model = attach_trials(base, {n: (c.method, _seed(c)) for n, c in configs.items()})
        self.active = ActiveTrials(tuple(configs))
        patch_trial_linears(model, self.active)
        self.engine = TrialsEngine(
            model=model,
            loss=LabelLoss(model),
            configs=configs,
            active=self.active,
            world=bench.world,
            dtype=dtype,
        )

    def step(self, step: int, named: Iterable[str] | None = None) -> dict[str, Update]:
        """Forward and backward of the active trials, and the update of the named ones (all active ones)."""
        self.accumulate(step)
        return self.engine.update_trials({n: self.rate(n, step) for n in named or self.active.names})

    def accumulate(self, step: int) -> tuple[Tensor, Tensor]:
        made = self.loader.load(step)
        micros = len(made.batches)
        scale, chunks = self.world.world_size / made.label_tokens, [self.engine.active.names]
        return self.engine.accumulate_trials(made.batches, scale, range(micros), chunks)

    def rate(self, name: str, step: int) -> float:
        config = self.configs[name]
        assert config.optim.learning_rate is not None
        return learning_rate(step, STEPS, config.optim.learning_rate, config.schedule)

    def states(self, names: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """Masters, moments and what the forward uses, of some trials; on rank 0."""
        return {name: state_of(view_trial(self.engine, name)) for name in names}

    def counts(self, name: str) -> list[float]:
        """The step counts of a trial's shares, each once."""
        optimizer = self.engine.optimizer
        adam = optimizer if self.engine.zero_stage == 0 else optimizer.optimizer
        return sorted({float(adam.state[share]["step"]) for share in view_trial(self.engine, name).shares})


def _seed(config: TrainConfig) -> int:
    return config.run.seed if config.method.seed is None else config.method.seed


def state_of(engine: StateOwner) -> dict[str, Tensor]:
    live = gather_live(engine, only_trainable=True)
    return gather_state(engine) | {f"live/{name}": tensor for name, tensor in live.items()}


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(WEIGHT): t for n, t in state.items() if n.startswith(WEIGHT)}


class Poisoned:
    """The loss of one trial is not a number, on the last rank alone."""

    def __init__(self, loss: LabelLoss, trial: int, is_here: bool) -> None:
        self.loss, self.trial, self.is_here = loss, trial, is_here

    def __call__(self, forward: Any, batch: Any, trials: int | None = None) -> Tensor:
        out = self.loss(forward, batch, trials=trials)
        factors = torch.ones_like(out)
        if self.is_here:
            factors[self.trial] = float("nan")
        return out * factors


def run_group(bench: Bench, references: dict[str, dict[str, Tensor]], zero: str) -> dict[str, Any]:
    """Five steps: ``trial_3`` fails in the third and is taken off the engine; ``trial_0`` goes on in a run of its own
    beside it; and its state comes back."""
    common = [f"zero={zero}", *(SEVERAL_SHARES if zero == "stage3" else ()), *sys.argv[2:]]
    configs = {name: bench.config(*common, *own) for name, own in TRIALS.items()}
    lone = bench.loop(configs["trial_0"])
    group, folder = Group(bench, configs, lone), bench.shared_folder()
    others = ("trial_0", "trial_1", "trial_2")
    found: dict[str, Any] = {}

    before = group.states(TRIALS)
    group.step(0)
    group.step(1, named=TRIALS)
    found |= _fail(bench, group, others)

    view = view_trial(group.engine, "trial_0")
    saves = Checkpointer(
        engine=view, run_dir=folder, run_identity=lone.checkpointer.run_identity, config=lone.config.checkpoint
    )
    assert saves.save(3)
    checkpoint = folder / "checkpoints" / "step-00000003"
    lone.checkpointer.restore(checkpoint)
    found["restored alone"] = equal(state_of(lone.engine), group.states(["trial_0"])["trial_0"])
    found["adapter"] = _same_adapter(bench, lone, checkpoint)

    kept = group.states(others)
    group.engine.rebuild(others)
    now = group.states(others)
    found["rebuilt"] = [equal(kept[n], now[n]) for n in others]
    found["adapters"] = sorted({n.split(".")[-2] for n, _ in group.engine.model.named_parameters() if "lora_A" in n})
    for step in (3, 4):
        group.step(step)
        lone.step(step)
    last = group.states(others)
    found["moved"] = [not equal(before[n], last[n]) for n in others]

    alone = gather_weights(lone)
    object.__setattr__(lone.checkpointer, "run_dir", folder)
    assert lone.checkpointer.save(5)
    untouched = group.step(4, named=["trial_0"])  # away from it; the others are active, and not named
    assert set(untouched) == {"trial_0"}
    now = group.states(others)
    found["not named"] = [equal(now[n], last[n]) for n in others]
    saves.restore(folder / "checkpoints" / "step-00000005")
    now = group.states(others)
    found["restored together"] = equal(now["trial_0"], state_of(lone.engine))
    found["others at a restore"] = [equal(now[n], last[n]) for n in others[1:]]
    found["scores"] = _score_distances(group, lone)
    found["counts at the end"] = [group.counts("trial_0"), group.counts("trial_1")]
    if not bench.world.is_main:
        return {}
    for name in others:
        if name not in references:
            config = configs[name]
            references[name] = trained_reference(resolve("tiny"), config, reference_batches(lone), STEPS)[1]
    found["distances"] = {n: worst_distance(weights(last[n]), references[n]) for n in others}
    found["distance alone"] = worst_distance(alone, references["trial_0"])
    return found


def _fail(bench: Bench, group: Group, others: Sequence[str]) -> dict[str, Any]:
    """Take the third step, in which the last rank's loss of ``trial_3`` is not a number."""
    sound, failing = group.states(["trial_3"]), list(TRIALS).index("trial_3")
    loss = group.engine.loss
    group.engine.loss = Poisoned(loss, failing, bench.world.rank == bench.world.world_size - 1)  # type: ignore[assignment]
    sums, finite = group.accumulate(2)
    group.engine.loss = loss
    update = group.engine.update_trials({name: group.rate(name, 2) for name in TRIALS})
    return {
        "finite": gather_objects([sums.isfinite().all(0).tolist(), finite.tolist()])[-1],
        "failed": [update["trial_3"].applied, str(update["trial_3"].grad_norm)],
        "applied": [update[n].applied for n in others],
        "failed is untouched": equal(group.states(["trial_3"])["trial_3"], sound["trial_3"]),
        "counts": [group.counts("trial_0"), group.counts("trial_3")],
    }


def _score_distances(group: Group, lone: Loop) -> list[float]:
    """Loss and label logits of one micro-batch: a view, against a run of its own with the same weights."""
    batch, view = lone.loader.load(0).batches[0], view_trial(group.engine, "trial_0")
    group.engine.eval()
    lone.engine.eval()
    with torch.no_grad():
        pairs = [(e.loss_sum(batch), e.label_logits(batch)) for e in (view, lone.engine)]
    assert group.active.names == ("trial_0", "trial_1", "trial_2"), "the view has left them as they were"
    return [float((one - other).norm() / other.norm()) for one, other in zip(*pairs, strict=True)]


def _same_adapter(bench: Bench, lone: Loop, checkpoint: Path) -> list[bool]:
    """The files of an adapter that a view has written, against those of a run of its own with the same weights."""
    assert lone.checkpointer.engine is lone.engine
    folder = bench.shared_folder()
    object.__setattr__(lone.checkpointer, "run_dir", folder)
    lone.checkpointer.save(3)
    other = folder / checkpoint.relative_to(checkpoint.parents[1])
    if not bench.world.is_main:
        return []
    same = [
        (checkpoint / name).read_bytes() == (other / name).read_bytes()
        for name in ("adapter/adapter_model.safetensors", "state.safetensors")
    ]
    one, two = (json.loads((f / "adapter" / "adapter_config.json").read_text()) for f in (checkpoint, other))
    return [*same, one == two]


if __name__ == "__main__":
    bench = Bench()
    references: dict[str, dict[str, Tensor]] = {}
    cases: dict[str, Callable[[Bench], Any]] = {z: partial(run_group, references=references, zero=z) for z in ZERO}
    bench.record(cases)
