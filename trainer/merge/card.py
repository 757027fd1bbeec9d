"""Write the model card of a merged model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.config.method import METHODS
from trainer.config.schema import TrainConfig
from trainer.merge.merge import MergeResult
from trainer.models.embedded import EMBEDDED


def model_card(config: TrainConfig, summary: dict[str, Any], result: MergeResult) -> str:
    """Return the card as Markdown: what the folder holds, where it comes from, the figures of run and merge.

    Args:
        config: the run's.
        summary: what the run's summary.json holds.
        result: of the merge.
    """
    method, title = config.method, METHODS[config.method.name].title
    base = config.model.name_or_path
    if base in EMBEDDED:
        base = EMBEDDED[base].hub_id or base
    name = Path(base).name
    loader, towers = "AutoModelForCausalLM", ""
    if result.is_multimodal:
        loader, towers = (
            "AutoModelForImageTextToText",
            " Its text part was trained; the rest is the base's own.",
        )
    lines = [
        "---",
        f"base_model: {json.dumps(name if Path(base).is_dir() else base)}",
        "library_name: transformers",
        f"pipeline_tag: {'image-text-to-text' if result.is_multimodal else 'text-generation'}",
        "tags: [afina, merged]",
        "---",
        f"# {name}, fine-tuned with {title}",
        "",
        f"An adapter ({title}{'' if method.r is None else f', r = {method.r}'}) merged into its base by afina. It is a "
        f"plain model now: `{loader}.from_pretrained` and `AutoTokenizer.from_pretrained` read this folder.{towers}",
        "",
        f"Data: `{_names(config.data.path)}`, {summary.get('steps')} updates of {config.batch.global_size} examples, "
        f"loss on: {config.data.train_on}, seed {config.run.seed}.",
        *_scores(summary),
        "",
        "## How the merge was proved",
        "",
        *_describe_checks(result),
    ]
    if result.training_distance is not None:
        lines.append(
            f"- The adapter was trained on the base in {method.bits} bits and merged into the base in 16 bits: the "
            f"merged model's logits are {result.training_distance:.1e} from those in training."
        )
    return "\n".join(lines) + "\n"


def _scores(summary: dict[str, Any]) -> list[str]:
    metrics = summary.get("metrics") or {}
    rows = [f"| {name} | {value:.4g} |" for name, value in metrics.items()]
    return ["", "| score on held-out rows | |", "|---|---|", *rows] if rows else []


def _describe_checks(result: MergeResult) -> list[str]:
    return [
        f"- Each of {result.layers} folded layers does in fp32, on random inputs, what it did with its adapter.",
        f"- Read back from disk, all {result.tensors} tensors are to the bit what was folded.",
        f"- On {result.prompts} prompts its logits are {result.distance:.1e} (relative, Frobenius) from the live "
        f"adapter's, where {result.bound:.1e} is allowed; those of the base without the adapter are "
        f"{result.base_distance:.1e} from them. The likeliest token is the same at "
        f"{100 * result.top_token_agreement:.1f} % of the positions.",
    ]


def _names(path: Any) -> str:
    """File names without their folders: a path may name a machine."""
    parts = path if isinstance(path, list) else [path]
    return ", ".join(Path(str(p["path"] if isinstance(p, dict) else p)).name for p in parts)
