"""Folders of finished runs of the tiny model, made without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.config import load, to_yaml
from trainer.methods import attach, save_adapter, save_full, trainable_parameters
from trainer.models.embedded import resolve
from trainer.models.identity import describe_base

LETTERS = "abcdefghijkl"


def tiny() -> Any:
    return AutoModelForCausalLM.from_pretrained(resolve("tiny"), dtype=torch.float32).eval()


def finished(work: Path, name: str, *overrides: str, seed: int = 1, strength: float = 0.2) -> Path:
    """A run folder whose trained tensors were moved at random; its data is a file in ``work``."""
    rows = work / "rows.jsonl"
    if not rows.exists():
        rows.write_text("".join(f'{{"instruction": "Say {c}.", "output": "{c * 3}"}}\n' for c in LETTERS))
    keys = [f"data.path={rows}", "data.max_rows=null", "data.validation=4", "eval.metrics=[loss]"]
    config = load(["debug=tiny", *keys, f"run.name={name}", f"run.dir={work / 'runs'}", *overrides])
    run = work / "runs" / name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(config))
    model = attach(tiny(), config.method, seed=0, total_steps=10)
    generator = torch.Generator().manual_seed(seed)
    trained = trainable_parameters(model)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(strength * torch.randn(parameter.shape, generator=generator))
    weights = {n: p.detach() for n, p in trained.items()}
    folder = run / ("model" if config.method.name == "full" else "adapter")
    if config.method.name == "full":
        save_full(model, folder, {**model.state_dict(), **weights})
    else:
        save_adapter(model, folder, weights, base=describe_base(config.model, resolve(config.model.name_or_path)))
    AutoTokenizer.from_pretrained(resolve("tiny")).save_pretrained(folder)
    return run
