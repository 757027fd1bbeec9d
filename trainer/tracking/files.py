"""Write and read `metrics.jsonl` and `summary.json` of a run folder; a kill at any byte leaves them readable.

Whoever reads them (checkpoints, sweeps, comparisons) reads them here. Loads no torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainer.errors import AfinaError, CheckpointError
from trainer.files import parse_json, write_atomically
from trainer.redaction import redact

Record = dict[str, Any]

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
CONFIG_FILE = "config.yaml"
RUN_FILES = (CONFIG_FILE, METRICS_FILE, SUMMARY_FILE)
"""A folder that has one of them is a run's."""
STOP_FILE = "STOP"
"""Put into a run folder it asks the run to save and leave."""
SUMMARY_KEYS = (
    "status",
    "steps",
    "wall_seconds",
    "trainable_parameters",
    "total_parameters",
    "train_loss",
    "metrics",
    "best_step",
    "skipped_steps",
    "stopped_early",
    "stopped_by",
    "save_seconds",
    "data_fingerprint",
    "error",
)
STATUSES = ("finished", "preempted", "failed")


def strict(value: Any) -> Any:
    """Return a value as strict JSON can hold it: NaN and infinities become null, 0-d arrays plain numbers."""
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "item"):
        return strict(value.item())
    return str(value)


class MetricsFile:
    """The open `metrics.jsonl` of a run, one line a step in rising order.

    Opening it drops what comes after ``resume_step`` (those steps are done again) and a line that a kill tore.

    Args:
        folder: the run folder.
        resume_step: updates that the run is resumed after; 0 drops all lines but that of step 0.
    """

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        self.path = folder / METRICS_FILE
        self.last: Record | None = None
        self._pending: list[Record] = []
        self._keep_lines_until(resume_step)
        self._open()

    def write(self, record: Record) -> None:
        """Add one line; a record of the step that was written last is merged into its line.

        Raises:
            OSError: the line could not be written; it is kept and written with the next one.
        """
        step, last = record["step"], self.last
        if last is None or step > last["step"]:
            self._pending.append(record)
        else:
            assert step == last["step"], f"step {step} was logged after step {last['step']}"
            record = {**last, **record}
            self._take_last_back()
            self._pending.append(record)
        self.last = record
        self._append_pending()

    def close(self) -> None:
        self._file.close()

    def _open(self) -> None:
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (open as long as the run)
        self._complete_bytes = self._file.tell()

    def _append_pending(self) -> None:
        rest = b"".join(_line(record) for record in self._pending)
        try:
            # A raw file may take only a part of what it is given when the disk fills up.
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            os.truncate(self.path, self._complete_bytes)
            raise
        self._pending = []
        self._complete_bytes = self._file.tell()

    def _take_last_back(self) -> None:
        assert self.last is not None
        if self._pending:
            self._pending.pop()
            return
        self._keep_lines_until(self.last["step"] - 1)
        self._file.close()
        self._open()

    def _keep_lines_until(self, step: int) -> None:
        content = self.path.read_bytes() if self.path.exists() else b""
        by_step: dict[int, Record] = {}
        for record in _parse(content):
            if record["step"] <= step:
                by_step[record["step"]] = {**by_step.get(record["step"], {}), **record}
        kept = [by_step[key] for key in sorted(by_step)]
        self.last = kept[-1] if kept else None
        cleaned = b"".join(_line(record) for record in kept)
        if cleaned != content:
            write_atomically(self.path, cleaned)


def read_metrics(folder: Path) -> list[Record]:
    """Read the records of a run's `metrics.jsonl`, one a step; a last line that is torn or being written is left out.

    Raises:
        CheckpointError: there is no such file, or a line before the last is not a record.
    """
    path = Path(folder) / METRICS_FILE
    content = _read(path)
    lines = content.split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        if _record(line) is None:
            raise CheckpointError(f"{path}:{number}", reason="is not a JSON object with a step")
    return list(_parse(content))


def build_summary(
    *,
    status: str,
    steps: int,
    wall_seconds: float,
    trainable_parameters: int | None = None,
    total_parameters: int | None = None,
    train_loss: float | None = None,
    metrics: Mapping[str, float] | None = None,
    best_step: int | None = None,
    skipped_steps: int = 0,
    stopped_early: str | None = None,
    stopped_by: str | None = None,
    save_seconds: float | None = None,
    data_fingerprint: str | None = None,
    error: Mapping[str, Any] | None = None,
) -> Record:
    """Build the content of `summary.json`: the same keys however a run ends; ``None`` is what a run does not have.

    Args:
        status: one of ``STATUSES``.
        steps: updates taken.
        wall_seconds: of all its lives, as far as they have logged.
        trainable_parameters, total_parameters: numbers of weights.
        train_loss: mean loss a label token of the last step.
        metrics: flat, of the weights that the run ends with; ``*_before`` are those before training.
        best_step: the step that these weights are of, where the best ones were kept.
        skipped_steps: of ``steps``, those whose updates were left out.
        stopped_early: why the run ended before its last step.
        stopped_by: what asked a preempted run to stop: a signal's name, ``STOP_FILE``, the death of its launcher.
        save_seconds: of the longest save of a checkpoint in its last life.
        data_fingerprint: of the prepared rows that it was trained on.
        error: as :func:`describe_error` gives it.
    """
    assert status in STATUSES, f"unknown status {status!r}"
    return {
        "status": status,
        "steps": steps,
        "wall_seconds": wall_seconds,
        "trainable_parameters": trainable_parameters,
        "total_parameters": total_parameters,
        "train_loss": train_loss,
        "metrics": dict(metrics or {}),
        "best_step": best_step,
        "skipped_steps": skipped_steps,
        "stopped_early": stopped_early,
        "stopped_by": stopped_by,
        "save_seconds": save_seconds,
        "data_fingerprint": data_fingerprint,
        "error": None if error is None else dict(error),
    }


def describe_error(error: BaseException, rank: int) -> Record:
    """Build the ``error`` of a summary: kind, message, and the rank that met it.

    Args:
        error: what ended the run.
        rank: this process's; an error that every rank raises alike names the one that met it itself.
    """
    kind = error.kind if isinstance(error, AfinaError) else type(error).__name__
    met_by = error.rank if isinstance(error, AfinaError) else None
    return {"kind": kind, "message": redact(str(error)), "rank": rank if met_by is None else met_by}


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json` atomically.

    Args:
        folder: the run folder.
        summary: what :func:`build_summary` gives, and whatever else.
    """
    complete = {
        **dict.fromkeys(("best_step", "stopped_early", "stopped_by", "save_seconds", "data_fingerprint", "error")),
        "skipped_steps": 0,
        **summary,
    }
    missing = [key for key in SUMMARY_KEYS if key not in complete]
    assert not missing, f"summary without {missing}"
    assert complete["status"] in STATUSES, f"unknown status {complete['status']!r}"
    ordered = {key: complete[key] for key in SUMMARY_KEYS} | complete
    text = json.dumps(strict(ordered), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(Path(folder) / SUMMARY_FILE, text.encode() + b"\n")


def read_summary(folder: Path) -> Record | None:
    """Read `summary.json` of a run folder; ``None`` where no run has ended in it yet.

    Raises:
        CheckpointError: the file is there but is not a JSON object.
    """
    path = Path(folder) / SUMMARY_FILE
    if not path.exists():
        return None
    try:
        summary = parse_json(_read(path))
    except ValueError:
        summary = None
    if not isinstance(summary, dict):
        raise CheckpointError(
            str(path), reason="is not a JSON object", hint="move it away; the next run writes a new one"
        )
    return summary


def find_summary(folder: Path) -> Record:
    """Read `summary.json` as :func:`read_summary` does; an empty record where there is none or it cannot be read.

    For tables over many runs, which one bad file must not take away.
    """
    try:
        return read_summary(folder) or {}
    except CheckpointError:
        return {}


def _line(record: Record) -> bytes:
    return json.dumps(strict(record), ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _record(line: bytes) -> Record | None:
    try:
        value = parse_json(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("step"), int) else None


def _parse(content: bytes) -> Iterable[Record]:
    """Records of the complete lines. What follows the last newline is torn, even if it happens to parse."""
    for line in content.split(b"\n")[:-1]:
        record = _record(line)
        if record is not None:
            yield record


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            str(path), reason=f"cannot be read ({error.strerror})", hint="name a run folder, e.g. runs/NAME"
        ) from error
