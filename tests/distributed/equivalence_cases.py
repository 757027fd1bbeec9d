"""On any number of ranks: each way the batch can be cut, against one plain process.

On one and two ranks five steps of every cut, stage and method; on one, two and three ranks twenty steps of tries and of
padded rows, where an error that five steps hide has time to grow.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from tests.distributed.bench import Bench, gather_weights, reference_batches
from tests.helpers.reference import train_reference, worst_distance
from trainer.models.embedded import resolve

CUTS = {
    "rows1": ["batch.micro_size=1"],
    "rows2": ["batch.micro_size=2"],
    "rows4": ["batch.micro_size=4"],
    "uneven": ["batch.micro_size=3"],
}
ZERO = ("stage0", "stage1", "stage2", "stage3", "stage2_offload", "stage3_offload")
# A smaller rate than over five steps: at 0.01 twenty steps of the tiny model amplify rounding itself to 1.5e-5.
LONG = ["batch.max_steps=20", "batch.epochs=3", "optim.learning_rate=0.003", "batch.micro_tokens=400"]
LONG += ["data.max_length=400"]
# Those that a CPU can run; attention in pieces, of tries and of padded rows.
KERNELS = ["model.kernels=[varlen,lora,rms_norm]", "data.max_length=400", "batch.micro_tokens=400"]


def cases(world_size: int) -> dict[str, list[str]]:
    """What is run on so many ranks: overrides by name."""
    twenty = {
        f"lora {zero} {packing} 20 steps": [f"zero={zero}", f"batch.packing={packing}", *LONG]
        for zero in ("stage0", "stage2", "stage3")
        for packing in ("trie", "padded")
    }
    return twenty if world_size > 2 else {**five_steps(), **twenty}


def five_steps() -> dict[str, list[str]]:
    """Tries (the default, once verified) in threes under every stage; under stages 2 and 3 in every cut, and beside
    padded rows; gradient checkpointing (of all or selective) and all weights under every stage; the fused kernels."""
    out: dict[str, list[str]] = {}
    for zero in ZERO:
        thorough = zero in ("stage2", "stage3")
        for cut, overrides in CUTS.items():
            if thorough or cut == "uneven":
                out[f"lora {zero} {cut}"] = [f"zero={zero}", *overrides]
        if thorough:
            out[f"lora {zero} padded"] = [
                f"zero={zero}",
                "data.max_length=400",
                "batch.micro_tokens=400",
                "batch.packing=padded",
            ]
            out[f"lora {zero} nodes"] = [
                f"zero={zero}",
                "data.max_length=400",
                "batch.micro_tokens=400",
                "batch.packing=trie",
            ]
        way = "selective" if zero in ("stage1", "stage3", "stage3_offload") else "true"
        saves = f"model.gradient_checkpointing={way}"
        out[f"lora {zero} checkpointing"] = [f"zero={zero}", "batch.micro_size=2", saves]
        if "offload" not in zero:
            packing = "padded" if zero in ("stage0", "stage3") else "trie"
            out[f"lora {zero} kernels"] = [f"zero={zero}", *KERNELS, saves, f"batch.packing={packing}"]
        out[f"full {zero} uneven"] = ["method=full", f"zero={zero}", "batch.micro_size=3"]
    out["lora bf16 stage2 uneven"] = ["zero=stage2", "model.dtype=bf16", "batch.micro_size=3"]
    return out


class Equivalence:
    """Train each case and compare it with the plain process; one reference for all cuts of the same method."""

    def __init__(self) -> None:
        self.references: dict[tuple[str, int], dict[str, Tensor]] = {}

    def __call__(self, bench: Bench, case: str, overrides: list[str]) -> float | None:
        loop = bench.loop(bench.config(*overrides))
        assert all(module.training for module in loop.engine.model.modules()), "dropout, checkpointing"
        assert loop.packing.uses_trie == ("batch.packing=padded" not in overrides), "the verification fell back"
        if "kernels" in case:
            assert loop.packing.in_pieces
            assert any("forward" in vars(m) for n, m in loop.engine.model.named_modules() if n.endswith("q_proj"))
        for step in range(loop.schedule.total_steps):
            loop.step(step)
        found = gather_weights(loop)
        if not bench.world.is_main:
            return None
        steps = loop.schedule.total_steps
        key = (loop.config.method.name, steps)
        if key not in self.references:
            base = resolve(loop.config.model.name_or_path)
            self.references[key] = train_reference(base, loop.config, reference_batches(loop, steps), steps)
        return worst_distance(found, self.references[key])


if __name__ == "__main__":
    bench, equivalence = Bench(), Equivalence()
    by_name = cases(bench.world.world_size)
    bench.record({name: partial(equivalence, case=name, overrides=overrides) for name, overrides in by_name.items()})
