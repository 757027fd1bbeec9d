"""Refuse a global batch of more rows than there are, before torch is loaded, where counting lines can tell."""

from __future__ import annotations

from pathlib import Path

from trainer.config.messages import config_error
from trainer.config.schema import TrainConfig
from trainer.errors import ConfigError


def check_row_count(config: TrainConfig) -> None:
    """Raise where ``data.max_rows`` or the lines of one JSON Lines file are fewer than ``batch.global_size``.

    Other sources are counted when they are prepared: what a row of them is takes reading. So are rows that are split.
    """
    wanted, limit = config.batch.global_size, config.data.max_rows
    if limit is not None and limit < wanted:
        raise _too_few(wanted, limit, f"data.max_rows={limit}")
    path = config.data.path
    if config.data.on_too_long == "split" or not isinstance(path, str):
        return
    if not path.endswith(".jsonl") or not Path(path).is_file():
        return
    validation = config.data.validation
    held_out = validation if isinstance(validation, int) and not isinstance(validation, bool) else 0
    lines = 0
    with Path(path).open("rb") as file:
        for line in file:
            lines += bool(line.strip())
            if lines - held_out >= wanted:
                return
    if held_out < lines:
        beside = f", {held_out} of them held out" if held_out else ""
        raise _too_few(wanted, lines - held_out, f"{path} has {lines} rows{beside}")


def _too_few(wanted: int, rows: int, why: str) -> ConfigError:
    reason = f"is more than the {rows} training rows: {why}"
    return config_error("batch.global_size", wanted, reason, f"batch.global_size={rows} or less")
