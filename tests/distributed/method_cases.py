"""On two ranks: every method on every base precision under every ZeRO stage, against one plain process.

Each cell is trained, its adapter saved, and loaded by stock PEFT (bottleneck: by afina) on a fresh base, whose logits
are compared with those of the plain process. Gradient checkpointing and packing change from cell to cell, so that each
method meets both with and without each kind of stage.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from tests.distributed.bench import Bench, gather_weights, reference_batches, save_mixtures
from tests.helpers.mixtures import FAMILIES
from tests.helpers.new_tokens import NEW, save_tied, scramble
from tests.helpers.reference import reference_base, trained_reference, worst_distance
from trainer.config.rules.matrix import ZERO, cells, refusal
from trainer.distributed.process_group import barrier
from trainer.engine.whole_state import gather_live
from trainer.methods import load_adapter, save_adapter
from trainer.models.embedded import resolve

METHODS: dict[str, list[str]] = {
    "full": ["method=full"],
    "lora": ["method=lora", "method.r=4"],
    "rslora": ["method=rslora", "method.r=4"],
    "lora_new_tokens": ["method=lora", "method.r=4", NEW, "method.trainable_tokens=new"],
    "lora_modules_to_save": ["method=lora", "method.r=4", NEW, "method.modules_to_save=[embed_tokens,lm_head]"],
    "dora": ["method=dora", "method.r=4"],
    "experts": ["method=experts", "method.r=4", "method.target_modules=[o_proj]"],
    "adalora": ["method=adalora", "method.init_r=4", "method.target_r=2", "method.tinit=1", "method.tfinal=1",
                "method.deltaT=1", "batch.max_steps=5"],
    "ia3": ["method=ia3"],
    "prompt": ["method=prompt", "method.virtual_tokens=4"],
    "prefix": ["method=prefix", "method.virtual_tokens=4"],
    "bottleneck": ["method=bottleneck", "method.reduction_factor=8"],
}  # fmt: skip


IN_BF16 = "bf16 stage2"
HEADS = [
    f"{name} {head} {zero}"
    for name in ("lora_new_tokens", "lora_modules_to_save")
    for head, zero in (("tied", "stage2"), ("tied", "stage3"), ("untied", "stage3"))
]
# The embeddings of tiny are small enough for DeepSpeed to keep whole under stage 3; those of real models are not.
SPLIT = "zero.extra.zero_optimization.stage3_param_persistence_threshold=0"


def list_cells(methods: list[str]) -> dict[str, list[str]]:
    """Overrides of every cell of these methods that the matrix does not refuse, by the cell's name; of each method one
    that computes in bf16; and of those that train embeddings five steps, the output layer tied to the input or not."""
    base = ["batch.max_steps=3", "data.max_length=400", "batch.micro_tokens=400"]
    out = {f"{name} {IN_BF16}": [*base, "zero=stage2", "model.dtype=bf16", *METHODS[name]] for name in methods}
    for case in HEADS:
        name, _, zero = case.split()
        if name in methods:
            split = [SPLIT] if zero == "stage3" else []
            out[case] = [*base, "batch.max_steps=5", f"zero={zero}", *METHODS[name], *split]
    for (method, bits, zero), cell in cells().items():
        if method not in methods or refusal(cell) is not None:
            continue
        number = list(ZERO).index(zero)
        saves = (number + bits // 4) % 2 == 0 and method != "prefix"
        uses_trie = (number // 2 + bits // 4) % 2 == 0 and method not in ("prompt", "prefix")
        # gpt-oss has eager attention, which knows no trie
        uses_trie = uses_trie and (method != "experts" or family(f"{method} {bits} {zero}") != "gpt_oss")
        uses_kernels = method in ("lora", "rslora", "dora", "lora_new_tokens") and (number + bits // 8) % 2 == 0
        out[f"{method} {bits} {zero}"] = [
            *(*base, f"zero={zero}", f"method.bits={bits}", *METHODS[method]),
            f"model.gradient_checkpointing={str(saves).lower()}",
            f"batch.packing={'trie' if uses_trie else 'padded'}",
            *(["model.kernels=[lora,rms_norm]"] if uses_kernels else []),
            *([SPLIT] if ZERO[zero] == 3 and (method == "experts" or NEW in METHODS[method]) else []),
            *(["method.quant_storage=uint8"] if (method, bits) == ("rslora", 4) else []),  # stage 3 too
        ]
    return out


def family(case: str) -> str:
    """The mixture that a cell of experts is trained on: each meets three stages, with and without offload."""
    _, bits, zero = case.split()
    number = list(ZERO).index(zero) + int(bits.replace("bf", "")) // 4
    # in 8 bits bitsandbytes fails on CPU on inputs of 4 dimensions, which latent attention has
    names = [name for name in FAMILIES if bits != "8" or name != "deepseek_v3"]
    return names[number % len(names)]


IDS = torch.arange(5, 45).view(4, 10)


def logits(model: Any) -> torch.Tensor:
    model.train()  # in evaluation mode bitsandbytes computes otherwise; dropout is 0
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits[:, -10:].float()


class Cell:
    """Train a cell and compare it with the plain process; one reference for all stages of a method on a base."""

    def __init__(self, mixtures: Path) -> None:
        self.mixtures = mixtures
        self.references: dict[str, Any] = {}
        self.tied: Path | None = None

    def tied_base(self, bench: Bench) -> Path:
        if self.tied is None:
            self.tied = bench.shared_folder()
            if bench.world.is_main:
                save_tied(resolve("tiny"), self.tied)
            barrier()
        return self.tied

    def __call__(self, bench: Bench, case: str, overrides: list[str]) -> list[float] | None:
        of_mixture = [f"model.name_or_path={self.mixtures}/{family(case)}"] if case.startswith("experts") else []
        tied = [f"model.name_or_path={self.tied_base(bench)}"] if " tied " in case else []
        config = bench.config(*overrides, *of_mixture, *tied)
        loop = bench.loop(config)
        steps = loop.schedule.total_steps
        for step in range(steps):
            loop.step(step)
        found, live = gather_weights(loop), gather_live(loop.engine, only_trainable=True)
        if not bench.world.is_main:
            return None
        base = resolve(config.model.name_or_path)
        key = f"{case.split()[:2]} {steps} {base}"
        if key not in self.references:
            self.references[key] = trained_reference(base, config, reference_batches(loop, steps), steps)
        model, expected = self.references[key]
        return [worst_distance(found, expected), reloaded(loop, live, model, base)]


def reloaded(loop: Any, live: Any, model: Any, base: str) -> float:
    """Relative distance of the logits: the saved adapter on a fresh base, and the plain process."""
    config, expected = loop.config, logits(model)
    if config.method.name == "full":
        return 0.0
    with tempfile.TemporaryDirectory() as name:
        save_adapter(loop.engine.model, Path(name), live, loop.engine.runtime.initial_weights)
        fresh = scramble(reference_base(base, config), config)
        stock = config.method.name != "bottleneck"
        found = logits(PeftModel.from_pretrained(fresh, name) if stock else load_adapter(fresh, Path(name)))
    return float((found - expected).norm() / expected.norm())


def main() -> None:
    bench, chosen = Bench(), list_cells(sys.argv[2].split(","))
    cell = Cell(save_mixtures(bench) if any(case.startswith("experts") for case in chosen) else Path())
    bench.record({case: partial(cell, case=case, overrides=overrides) for case, overrides in chosen.items()})


if __name__ == "__main__":
    main()
