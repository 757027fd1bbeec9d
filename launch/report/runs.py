"""Read a run folder as it stands: finished, failed, or still being written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.report.log_file import Event, LogFile, read_log
from trainer.config import METRICS, read_values
from trainer.errors import AfinaError
from trainer.files import find_owner, parse_json
from trainer.tracking.files import Record, find_summary, read_metrics

SCORES = ("eval_loss", "train_loss", "eval_perplexity", *(name for name in METRICS if name != "loss"))


@dataclass(slots=True)
class Run:
    """Hold what is known of one run.

    Attributes:
        name: of the run among the others: its folder's, or the method's.
        folder: where it is; ``None`` where nothing was started.
        status: of its summary; ``running`` while a process trains it, ``unfinished`` where none does and there is no
            summary, ``refused`` or ``not run`` where nothing was started.
        error: why it failed or was refused.
        config: by dotted key.
        summary: as `summary.json` has it; empty where there is none.
        metrics: of `metrics.jsonl`, one a step.
        log: what `log.txt` says.
        environment: as `environment.json` has it; empty where there is none.
        notes: what could not be read.
        tried: loss by learning rate, of the tries of a comparison.
    """

    name: str
    folder: Path | None = None
    status: str = "not run"
    error: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    summary: Record = field(default_factory=dict)
    metrics: list[Record] = field(default_factory=list)
    log: LogFile = field(default_factory=LogFile)
    environment: Record = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    tried: dict[str, Any] = field(default_factory=dict)

    @property
    def is_finished(self) -> bool:
        return self.status == "finished"

    def score(self, name: str) -> float | None:
        """Return a figure of the weights that it ends with, of those it has now while there is no end."""
        scores = as_map(self.summary.get("metrics"))
        found = self.summary.get(name) if name == "train_loss" else scores.get(name)
        if found is None and not self.is_finished:
            logged = "loss" if name == "train_loss" else name
            found = next((line[logged] for line in reversed(self.metrics) if line.get(logged) is not None), None)
        return number(found)

    def score_before(self, name: str) -> float | None:
        """Return the same figure of the weights before training."""
        found = as_map(self.summary.get("metrics")).get(f"{name}_before")
        if found is None and self.metrics and self.metrics[0]["step"] == 0:
            found = self.metrics[0].get(name)
        return number(found)

    def series(self, key: str) -> list[tuple[int, float | None]]:
        """Return the steps that have a key with its values; ``None`` is a value that is no finite number."""
        return [(line["step"], number(line[key])) for line in self.metrics if key in line]

    @property
    def steps(self) -> int | None:
        found = number(self.summary.get("steps"))
        return int(found) if found is not None else self.metrics[-1]["step"] if self.metrics else None

    @property
    def seconds(self) -> float | None:
        """Return the seconds of all its lives, as far as they are known."""
        lived = [number(line.get("elapsed_seconds")) for line in self.metrics[-1:]]
        return number(self.summary.get("wall_seconds")) or next(iter(lived), None)

    @property
    def events(self) -> list[Event]:
        """Return what happened to it, and its failure where the log cannot have it."""
        if self.status == "failed" and self.log.lives:
            last = self.log.lives[-1]
            return [*self.log.events, Event(last.end, last.step, "failed", self.error or "failed")]
        return self.log.events


def read_run(folder: Path, name: str | None = None) -> Run:
    """Read a run folder; what cannot be read is a note of the run, never an error."""
    run = Run(name or folder.name, folder)
    try:
        run.config = with_method_defaults(read_values(folder / "config.yaml"))
    except AfinaError as error:
        run.notes.append(str(error))
    run.summary = find_summary(folder)
    if not run.summary and (folder / "summary.json").exists():
        run.notes.append(f"{folder / 'summary.json'} is not a JSON object")
    if (folder / "metrics.jsonl").exists():
        try:
            run.metrics = read_metrics(folder)
        except AfinaError as error:
            run.notes.append(str(error))
    run.log = read_log(folder / "log.txt")
    run.environment = _environment(folder)
    run.status = status_of(_find_owner(folder), run.summary, bool(run.metrics or run.log.lives))
    message = as_map(run.summary.get("error")).get("message")
    run.error = None if message is None else str(message)
    return run


def _find_owner(folder: Path) -> str | None:
    try:
        return find_owner(folder)
    except OSError:  # a lock beside it that this user cannot open
        return None


def status_of(owner: str | None, summary: Record, has_begun: bool) -> str:
    """Return how a run stands, in one word (see :class:`Run`).

    Args:
        owner: the living process that trains it, if one does.
        summary: of its last end; empty where there was none.
        has_begun: whether it has left a line of its own.
    """
    if owner is not None:
        return "running"
    return str(summary.get("status") or ("unfinished" if has_begun else "not run"))


def _environment(folder: Path) -> Record:
    try:
        found = parse_json((folder / "environment.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def with_method_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a config with what follows from the method where it is null: alpha and learning rate."""
    from trainer.config.method import METHODS, default_alpha
    from trainer.config.optimizers import OPTIMIZERS, default_learning_rate

    found = dict(values)
    method, optimizer = str(found.get("method.name")), str(found.get("optim.name") or "adamw")
    rank = found.get("method.r")
    if found.get("method.alpha") is None and isinstance(rank, int):
        found["method.alpha"] = default_alpha(rank)
    is_known = method in METHODS and optimizer in OPTIMIZERS
    if "optim.learning_rate" in found and found["optim.learning_rate"] is None and is_known:
        found["optim.learning_rate"] = default_learning_rate(method, optimizer)
    return found


def saved_bytes(folder: Path) -> int:
    """Return the size of the weights that a run ended with: an adapter's, or the whole model's."""
    return sum(file.stat().st_size for name in ("adapter", "model") for file in (folder / name).glob("*.safetensors"))


def parameters(summary: Record) -> dict[str, float | None]:
    """Return how many weights were trained, and their share of all in percent."""
    trained, total = (number(summary.get(f"{kind}_parameters")) for kind in ("trainable", "total"))
    share = 100 * trained / total if trained and total else None
    return {"trainable_parameters": trained, "trainable_percent": share}


def cost(metrics: Sequence[Record]) -> dict[str, float | None]:
    """Return peak memory and speed of the logged steps."""
    steps = [line for line in metrics if number(line.get("step_seconds")) is not None]
    seconds = sum(step["step_seconds"] for step in steps)
    tokens = sum(number(step.get("useful_tokens")) or 0 for step in steps)
    peaks = [step["peak_memory_bytes"] for step in steps if number(step.get("peak_memory_bytes")) is not None]
    return {
        "peak_memory_bytes": max(peaks, default=None),
        "useful_tokens_per_second": tokens / seconds if seconds else None,
    }


def number(value: Any) -> float | None:
    """Return a finite number as it is, anything else as ``None``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # a whole number beyond all floats
        return None


def as_map(value: Any) -> Mapping[str, Any]:
    """Return a mapping as it is, anything else as an empty one: a file may hold anything where one is expected."""
    return value if isinstance(value, Mapping) else {}
