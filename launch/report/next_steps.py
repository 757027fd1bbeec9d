"""Say which commands go on from a run, a sweep or a comparison."""

from __future__ import annotations

import shlex
from pathlib import Path

from launch.report.runs import Run
from trainer.tracking.files import CONFIG_FILE
from trainer.tracking.result import commands_after


def going_on(run: Run) -> str | None:
    """Return the one command that goes on best from a run; ``None`` where nothing can."""
    return next(iter(next_commands(run)), None)


def next_commands(run: Run) -> list[str]:
    """Return what to type next, the most likely one first.

    Args:
        run: with its folder; its status may be ``sweep`` or ``comparison``.
    """
    assert run.folder is not None
    folder = shlex.quote(str(run.folder))
    if run.status in ("sweep", "comparison"):
        return [f"afina report {folder}"]
    if run.status == "running":
        return [f"afina logs {folder} --follow"]
    if not run.is_finished:
        if run.config:
            return [resume_command(run)]
        return [] if (run.folder / CONFIG_FILE).exists() else [f"afina status {folder}"]
    return commands_after(run.folder, run.config.get("method.name"))


def resume_command(run: Run) -> str:
    """Return the command that resumes a run where it stopped, wherever its folder is by now."""
    assert run.folder is not None
    words = ["afina", "train", "--config", str(run.folder / CONFIG_FILE)]
    place, name = run.config.get("run.dir"), run.config.get("run.name")
    if not isinstance(place, str) or Path(place).expanduser().resolve() != run.folder.parent.resolve():
        words.append(f"run.dir={run.folder.parent}")
    if name != run.folder.name:
        words.append(f"run.name={run.folder.name}")
    if run.summary.get("stopped_by") == "run.stop_at_step":
        words.append("run.stop_at_step=null")
    return shlex.join(words)
