"""The model card of a merged model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.config.method import METHODS
from trainer.config.schema import TrainConfig
from trainer.merge import Merged


def model_card(config: TrainConfig, summary: dict[str, Any], result: Merged) -> str:
    """What the folder holds, where it comes from, and the figures of the run and of the merge."""
    method, title = config.method, METHODS[config.method.name].title
    base = config.model.name_or_path
    scores = "".join(f"| {name} | {value:.4g} |\n" for name, value in (summary.get("metrics") or {}).items())
    lines = [
        "---",
        f"base_model: {json.dumps(Path(base).name if Path(base).is_dir() else base)}",
        "library_name: transformers",
        "tags: [afina, merged]",
        "---",
        f"# {Path(base).name}, fine-tuned with {title}",
        "",
        f"An adapter ({title}{'' if method.r is None else f', r = {method.r}'}) merged into its base by afina.",
    ]
    if method.bits < 16:
        lines += [
            "",
            f"The adapter was trained on the base in {method.bits} bits and merged into the base in 16 bits; the "
            f"logits of the two are {result.trained_distance:.1e} apart.",
        ]
    lines += [
        "",
        f"Read back from disk, its logits on {result.prompts} prompts are {result.distance:.1e} (relative, Frobenius) "
        f"from the live adapter's, where {result.bound:.1e} is allowed; the likeliest token is the same at "
        f"{100 * result.same_choice:.1f} % of the positions.",
        "",
        f"Data: `{_names(config.data.path)}`, {summary.get('steps')} updates of {config.batch.global_size} examples.",
        "",
        "| score on held-out rows | |",
        "|---|---|",
        scores,
    ]
    return "\n".join(lines)


def _names(path: Any) -> str:
    """File names without their folders: a path may name a machine."""
    parts = path if isinstance(path, list) else [path]
    return ", ".join(Path(str(p["path"] if isinstance(p, dict) else p)).name for p in parts)
