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
    """Write a time: ``42 s``, ``8 min 35 s``, ``3 h 12 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def size_text(size: float) -> str:
    """Write a number of bytes: ``812 B``, ``9.3 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def size_of(folder: Path) -> str:
    """Write the bytes of all files below a folder."""
    return size_text(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))


def commands_after(folder: Path, method: str | None) -> list[str]:
    """Return what people type after a run has finished, the likeliest first, each as it is typed.

    Args:
        folder: the run folder.
        method: ``method.name`` of its config, if that can be read.
    """
    trained, run, found = folder / _trained(method), shlex.quote(str(folder)), []
    if trained.is_dir():
        found.append(f"afina chat {run}")
        if method not in (None, *NOT_MERGEABLE):
            found.append(f"afina merge {run} --to {shlex.quote(f'{folder}-merged')}")
    found.append(f"afina report {run}")
    if next((folder / "wandb").glob("offline-run-*"), None) is not None:
        found.append(f"wandb sync {run}/wandb/offline-run-*")
    return found


def _cost(records: list[Any]) -> Iterator[str]:
    speeds = [r["useful_tokens_per_second"] for r in records if r.get("useful_tokens_per_second")]
    peaks = [r["peak_memory_bytes"] for r in records if r.get("peak_memory_bytes")]
    if speeds:
        memory = f", at most {max(peaks) / 2**30:.1f} GiB of a device" if peaks else ""
        yield f"speed: {median(speeds):,.0f} useful tokens/s (median step){memory}"


def _trained(method: str | None) -> str:
    return "model" if method == "full" else "adapter"


def _left(folder: Path, config: TrainConfig) -> Iterator[str]:
    trained = folder / _trained(config.method.name)
    if trained.is_dir():
        yield f"{trained.name}: {trained} ({size_of(trained)})"


def _next(folder: Path, config: TrainConfig) -> Iterator[str]:
    for number, command in enumerate(commands_after(folder, config.method.name)):
        yield f"{'      ' if number else 'next: '}{command}"
