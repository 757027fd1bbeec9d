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

from tests.distributed.bench import Bench, gather_weights, reference_batches
from tests.helpers.reference import reference_base, trained_reference, worst_distance
from trainer.config.rules.matrix import ZERO, cells, refusal
from trainer.engine.whole_state import gather_live
from trainer.methods import load_adapter, save_adapter
from trainer.models.embedded import resolve

METHODS: dict[str, list[str]] = {
    "full": ["method=full"],
    "lora": ["method=lora", "method.r=4"],
    "rslora": ["method=rslora", "method.r=4"],
    "dora": ["method=dora", "method.r=4"],
    "adalora": ["method=adalora", "method.init_r=4", "method.target_r=2", "method.tinit=1", "method.tfinal=1",
                "method.deltaT=1", "batch.max_steps=5"],
    "ia3": ["method=ia3"],
    "prompt": ["method=prompt", "method.virtual_tokens=4"],
    "prefix": ["method=prefix", "method.virtual_tokens=4"],
    "bottleneck": ["method=bottleneck", "method.reduction_factor=8"],
}  # fmt: skip


IN_BF16 = "bf16 stage2"


def list_cells(methods: list[str]) -> dict[str, list[str]]:
    """Overrides of every cell of these methods that the matrix does not refuse, by the cell's name; and of each method
    one that computes in bf16."""
    base = ["batch.max_steps=3", "data.max_length=400", "batch.micro_tokens=400"]
    out = {f"{name} {IN_BF16}": [*base, "zero=stage2", "model.dtype=bf16", *METHODS[name]] for name in methods}
    for (method, bits, zero), cell in cells().items():
        if method not in methods or refusal(cell) is not None:
            continue
        number = list(ZERO).index(zero)
        saves = (number + bits // 4) % 2 == 0 and method != "prefix"
        uses_trie = (number // 2 + bits // 4) % 2 == 0 and method not in ("prompt", "prefix")
        uses_kernels = method in ("lora", "rslora", "dora") and (number + bits // 8) % 2 == 0
        out[f"{method} {bits} {zero}"] = [
            *(*base, f"zero={zero}", f"method.bits={bits}", *METHODS[method]),
            f"model.gradient_checkpointing={str(saves).lower()}",
            f"batch.packing={'trie' if uses_trie else 'padded'}",
            *(["model.kernels=[lora,rms_norm]"] if uses_kernels else []),
            *(["method.quant_storage=uint8"] if (method, bits) == ("rslora", 4) else []),  # stage 3 too
        ]
    return out


IDS = torch.arange(5, 45).view(4, 10)


def logits(model: Any) -> torch.Tensor:
    model.train()  # in evaluation mode bitsandbytes computes otherwise; dropout is 0
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits[:, -10:].float()


class Cell:
    """Train a cell and compare it with the plain process; one reference for all stages of a method on a base."""

    def __init__(self) -> None:
        self.references: dict[str, Any] = {}

    def __call__(self, bench: Bench, case: str, overrides: list[str]) -> list[float] | None:
        config = bench.config(*overrides)
        loop = bench.loop(config)
        steps = loop.schedule.total_steps
        for step in range(steps):
            loop.step(step)
        found, live = gather_weights(loop), gather_live(loop.engine, only_trainable=True)
        if not bench.world.is_main:
            return None
        key, base = f"{case.split()[:2]} {steps}", resolve(config.model.name_or_path)
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
        fresh = reference_base(base, config)
        stock = config.method.name != "bottleneck"
        found = logits(PeftModel.from_pretrained(fresh, name) if stock else load_adapter(fresh, Path(name)))
    return float((found - expected).norm() / expected.norm())


if __name__ == "__main__":
    cell = Cell()
    chosen = list_cells(sys.argv[2].split(","))
    Bench().record({case: partial(cell, case=case, overrides=overrides) for case, overrides in chosen.items()})
