"""Train trials together in every way, and alone; run by ``test_together.py``.

The first argument is the folder of the cases, the second one the folder of the weights that lone runs come to: where
they are not there yet, this start makes them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.distributed.bench import Bench, gather_weights
from tests.helpers.reference import worst_distance
from trainer.checkpoint.run_folder import Run
from trainer.config import TrainConfig
from trainer.data.load import load_data
from trainer.models.embedded import resolve
from trainer.models.loading import load_tokenizer
from trainer.together import batches
from trainer.together.batches import CPU_TOKENS
from trainer.together.group import Group
from trainer.together.run import Left, run_group
from trainer.training.job import Job
from trainer.training.stop_request import StopRequest

STEPS = (5, 20)
COMMON = (
    *("log=off", "eval.before=false", "data.validation=0", "eval.metrics=[loss]"),
    *("checkpoint.keep=1", "batch.micro_tokens=1024"),
)
TRIALS: dict[str, tuple[str, ...]] = {
    "r4": ("method.r=4",),
    "r64": ("method.r=64", "optim.learning_rate=0.002"),
    "r16": ("method.r=16", "method.alpha=16", "schedule=linear"),
    "r8_rslora": ("method.r=8", "method.rslora=true", "optim.max_grad_norm=0.1"),
    "attention": ("method.r=8", "method.target_modules=attention", "optim.max_grad_norm=0"),
    "down": ("method.r=5", "method.target_modules=[down_proj]", "schedule=constant"),
    "last": ("method.r=8", "method.layers=[1]", "optim.weight_decay=0"),
    "last_wide": ("method.r=32", "method.layers=[1]", "optim.learning_rate=0.001"),
    "patterns": ("method.r=8", "method.rank_pattern={q_proj: 32}", "method.alpha_pattern={v_proj: 3}"),
    "seed": ("method.r=16", "method.seed=7", "method.init=gaussian"),
    "orthogonal": ("method.r=16", "method.init=orthogonal", "optim.beta1=0.8", "optim.beta2=0.9"),
    "warm": ("method.r=32", "schedule.warmup_steps=3", "optim.max_grad_norm=1"),
    "short": ("method.r=4", "method.seed=3", "batch.max_steps=3"),
}
BITS = {"16": (), "4": ("method.bits=4",)}

# By the bits of the base: each case with its steps and overrides.
CELLS: dict[str, dict[str, tuple[int, tuple[str, ...]]]] = {
    bits: {
        f"{bits} bits, stage {stage}, {packing}": (5, (f"zero=stage{stage}", f"batch.packing={packing}"))
        for stage in range(4)
        for packing in ("trie", "padded")
    }
    for bits in BITS
}
CELLS["16"]["20 steps"] = 20, ("zero=stage2",)
# Trials that leave the first layer to the base: it is computed once for both.
UPPER = ["last", "last_wide"]
UPPER_CELLS = {
    f"upper layers, stage {stage}, {packing}": (f"zero=stage{stage}", f"batch.packing={packing}")
    for stage, packing in ((0, "trie"), (1, "padded"), (2, "trie"), (3, "trie"), (3, "padded"))
}
UPPER_CELLS["upper layers, checkpointing"] = ("zero=stage3", "model.gradient_checkpointing=true")


def names(bits: str) -> list[str]:
    """Return the trials of a base in so many bits: PEFT has no orthogonal start on packed weights."""
    return [name for name in TRIALS if name != "orthogonal" or bits == "16"]


def overrides(name: str, bits: str, steps: int) -> list[str]:
    length = [] if name == "short" else [f"batch.max_steps={steps}"]
    return [*COMMON, *BITS[bits], *TRIALS[name], *length]


def lone_weights(bench: Bench, folder: Path, bits: str, steps: int) -> None:
    """Train each trial by itself, padded, on one rank under stage 0, and keep the weights."""
    for name in names(bits):
        config = bench.config(
            *overrides(name, bits, steps), "zero=stage0", "batch.packing=padded", "model.kernels=none"
        )
        loop = bench.loop(config)
        for step in range(loop.schedule.total_steps):
            loop.step(step)
        save_file(gather_weights(loop), str(folder / f"{name}-{bits}-{steps}.safetensors"))
        loop.loader.close()


def group_weights(bench: Bench, trials: Sequence[str], folder: Path, bits: str, steps: int, *more: str) -> None:
    """Train trials together to their ends, in run folders in ``folder``."""
    configs = {
        name: bench.config(*overrides(name, bits, steps), f"run.dir={folder}", f"run.name={name}", *more)
        for name in trials
    }
    group = Group(folder / "group", list(configs.values()))
    group.folder.mkdir(parents=True, exist_ok=True)
    assert run_group(group, _jobs(bench, configs, folder), Left([])), "all came to their end"


def _jobs(bench: Bench, configs: Mapping[str, TrainConfig], folder: Path) -> list[Job]:
    first = next(iter(configs.values()))
    base = resolve(first.model.name_or_path)
    tokenizer = load_tokenizer(base, first.model)
    data = load_data(first, tokenizer)
    return [
        Job(
            config=config,
            world=bench.world,
            base_dir=base,
            tokenizer=tokenizer,
            data=data,
            run=Run(folder / name),
            stop=StopRequest(),
            begin=0.0,
        )
        for name, config in configs.items()
    ]


def saved_weights(folder: Path) -> dict[str, Tensor]:
    """Return the masters in the newest checkpoint of a run."""
    newest = max((folder / "checkpoints").glob("step-*"))
    state = load_file(str(newest / "state.safetensors"))
    return {name.removeprefix("weight/"): t for name, t in state.items() if name.startswith("weight/")}


def set_tokens(more: Sequence[str]) -> None:
    """Let as many trials share a forward as fit in tries, as on a GPU; padded as many as fill a CPU."""
    batches.CPU_TOKENS = CPU_TOKENS if "batch.packing=padded" in more else 10**6


def distances(bench: Bench, lone: Path, trials: Sequence[str], bits: str, steps: int, *more: str) -> dict[str, float]:
    """Return how far each trial's worst tensor is from that of the lone run."""
    folder = bench.shared_folder()
    set_tokens(more)
    group_weights(bench, trials, folder, bits, steps, *more)
    if not bench.world.is_main:
        return {}
    found = {}
    for name in trials:
        expected = load_file(str(lone / f"{name}-{bits}-{steps}.safetensors"))
        own = saved_weights(folder / name)
        assert own.keys() == expected.keys(), name
        found[name] = worst_distance(own, expected)
    return found


def main() -> None:
    bench, lone = Bench(), Path(sys.argv[2])
    cases = {}
    if not any(lone.iterdir()):
        for bits in BITS:
            for steps in STEPS:
                if bits == "16" or steps == 5:
                    cases[f"lone {bits} {steps}"] = lambda b, x=bits, n=steps: lone_weights(b, lone, x, n)
    for bits, cells in CELLS.items():
        for case, (steps, more) in cells.items():
            cases[case] = lambda b, x=bits, n=steps, m=more: distances(b, lone, names(x), x, n, *m)
    for case, more in UPPER_CELLS.items():
        cases[case] = lambda b, m=more: distances(b, lone, UPPER, "16", 5, *m)
    cases["other order"] = lambda b: distances(b, lone, names("16")[::-1], "16", 5, "zero=stage2")
    bench.record(cases)


if __name__ == "__main__":
    main()
