"""Answer for a finished run without loading torch: the same command again takes a second."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.checkpoint.config_history import read_config
from trainer.config import TrainConfig, changed_result_fields, run_folder
from trainer.config.identity import PATH_FIELDS
from trainer.errors import AfinaError
from trainer.tracking.files import METRICS_FILE, SUMMARY_FILE, read_metrics, read_summary
from trainer.tracking.result import result_lines


def answer_of_finished(config: TrainConfig) -> list[str] | None:
    """Return what a finished run has to say, or ``None`` where it must be looked at in full: it is not finished, has
    other settings, is to be overwritten, or a file of its rows may have changed since.
    """
    folder = run_folder(config)
    try:
        summary = read_summary(folder) if folder.is_dir() else None
        if config.run.overwrite or not summary or summary.get("status") != "finished":
            return None
        before = read_config(folder)
        if before is None or changed_result_fields(before, config):
            return None
        ended = (folder / SUMMARY_FILE).stat().st_mtime
        if any(_changed_at(file) > ended for file in _sources(config)):
            return None
        return finished_lines(folder, before, summary)
    except (OSError, AfinaError):
        return None


def finished_lines(folder: Path, config: TrainConfig, summary: dict[str, Any]) -> list[str]:
    """Say that a run is finished already, and how it ended."""
    records = read_metrics(folder) if (folder / METRICS_FILE).exists() else []
    first = f"{folder} is finished; nothing is redone (run.overwrite=true starts afresh)"
    return [first, *result_lines(folder, config, summary, records)]


def _sources(config: TrainConfig) -> Iterator[str]:
    """Yield the files on this disk that the run's settings name, with those in its folders."""
    for section, _, field in (name.partition(".") for name in PATH_FIELDS):
        for text in _texts(getattr(getattr(config, section), field)):
            if os.path.isdir(text):
                yield from glob.iglob(os.path.join(glob.escape(text), "**"), recursive=True)
            else:
                yield from [text] if os.path.exists(text) else glob.iglob(text, recursive=True)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, dict):
        yield from _texts(value.get("path"))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _changed_at(file: str) -> float:
    """Return when a file got its content or its name, in seconds since 1970: one may be replaced by an older one."""
    found = os.stat(file)
    return max(found.st_mtime, found.st_ctime)
