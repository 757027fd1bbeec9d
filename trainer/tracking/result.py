"""Say how a run has ended, on one screen: scores, time, speed, memory, what it leaves, and what comes next.

Loads no torch: a finished run that is asked for again answers at once.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from trainer.config.method import NOT_MERGEABLE
from trainer.config.schema import METRICS, TrainConfig

SCORES = ("eval_loss", *METRICS)
# A tokenizer that is saved with one has it there.
CHAT_TEMPLATE = "chat_template.jinja"


def result_lines(
    folder: Path, config: TrainConfig, summary: Mapping[str, Any], records: Iterable[Any], with_next: bool = True
) -> list[str]:
    """Describe a finished run.

    Args:
        folder: the run folder.
        config: that it was made with.
        summary: its ``summary.json``.
        records: its ``metrics.jsonl``.
        with_next: say what people type next.
    """
    seconds = duration(summary.get("wall_seconds") or 0.0)
    return [
        *score_lines(summary.get("metrics") or {}),
        f"finished {summary.get('steps')} steps in {seconds}: {folder}",
        *_cost(list(records)),
        *_left(folder, config),
        *(_next(folder, config) if with_next else ()),
    ]


def score_lines(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line a score, with that of before training where there is one: ``exact_match: 0.0000 → 0.7734``."""
    for name in SCORES:
        if (value := metrics.get(name)) is not None:
            before = metrics.get(f"{name}_before")
            yield f"{name}: " + ("" if before is None else f"{before:.4f} → ") + f"{value:.4f}"


def duration(seconds: float) -> str:
    """Format seconds for people: ``93 s``, ``8 min 35 s``, ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def size_of(folder: Path) -> str:
    """Format the bytes of all files below a folder."""
    return format_bytes(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))


def format_bytes(size: float) -> str:
    """Format a number of bytes for people: ``9.4 MiB``."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _cost(records: list[Any]) -> Iterator[str]:
    speeds = [r["useful_tokens_per_second"] for r in records if r.get("useful_tokens_per_second")]
    peaks = [r["peak_memory_bytes"] for r in records if r.get("peak_memory_bytes")]
    if speeds:
        memory = f", at most {max(peaks) / 2**30:.1f} GiB of a device" if peaks else ""
        yield f"speed: {median(speeds):,.0f} useful tokens/s (median step){memory}"


def _trained(folder: Path, config: TrainConfig) -> Path:
    return folder / ("model" if config.method.name == "full" else "adapter")


def _left(folder: Path, config: TrainConfig) -> Iterator[str]:
    trained = _trained(folder, config)
    if trained.is_dir():
        yield f"{trained.name}: {trained} ({size_of(trained)})"


def _next(folder: Path, config: TrainConfig) -> Iterator[str]:
    """Yield the commands that people type next, each as it is typed."""
    trained, run = _trained(folder, config), shlex.quote(str(folder))
    if trained.is_dir():
        talks = (trained / CHAT_TEMPLATE).exists() and config.data.template != "plain"
        yield f"next: afina chat {run}" if talks else f'next: afina generate {run} "…"'
        if config.method.name not in NOT_MERGEABLE:
            yield f"      afina merge {run} --to {shlex.quote(f'{folder}-merged')}"
    yield f"      afina report {run}"
    if next((folder / "wandb").glob("offline-run-*"), None) is not None:
        yield f"      wandb sync {run}/wandb/offline-run-*"
