"""Describe the data of a run in a few lines, for its log."""

from __future__ import annotations

import numpy as np

from trainer.config.schema import TrainConfig
from trainer.data.run_data import Data

NAMED_FILES = 3
# What was done to the tokens that nobody has asked for, and what the data hold and nobody trains on.
TOLD_NOTES = ("begin_token", "other_split", "not_used")


def describe(data: Data, config: TrainConfig) -> list[str]:
    """Describe a run's data in a few lines for people: rows, lengths, tokens in the loss, rows left out, warnings."""
    lengths = data.train.lengths
    label_tokens = data.train.label_tokens(np.arange(len(data.train)))
    steps = data.total_steps(config.batch)
    passes = steps * config.batch.global_size / len(data.train)
    quantiles = " ".join(f"{q:.0f}" for q in np.quantile(lengths, (0, 0.5, 0.95, 1)))
    lines = [
        f"data: {len(data.train):,} rows to train on, {len(data.validation):,} held out, from {_name_files(data)}",
        f"tokens: {int(lengths.sum()):,}; a row min/median/95 %/max {quantiles}; {label_tokens:,} are in the loss",
        f"steps: {steps:,}, each of {config.batch.global_size} examples: {passes:.3g} x the rows",
    ]
    dropped, truncated, refused = (sum(getattr(p, n) for p in data.parts) for n in ("dropped", "truncated", "refused"))
    if dropped or truncated:
        lines.append(
            f"over data.max_length={config.data.max_length}: {dropped:,} rows left out, {truncated:,} rows cut to fit"
        )
    if refused:
        files = ", ".join(str(p.refused_file) for p in data.parts if p.refused)
        lines.append(f"refused: {refused:,} rows that cannot be used, see {files}")
    for finding in data.findings:
        if finding.level == "warning" or finding.kind in TOLD_NOTES:
            where = f" ({', '.join(finding.where)})" if finding.where else ""
            lines.append(f"{finding.level}: {finding.message}{where}")
    return lines


def _name_files(data: Data) -> str:
    names = [name for part in data.train.tables.parts for name in part.names]
    return ", ".join(names[:NAMED_FILES]) + (
        f" and {len(names) - NAMED_FILES} more" if len(names) > NAMED_FILES else ""
    )
