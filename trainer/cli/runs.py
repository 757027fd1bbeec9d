"""Verbs that look at what was trained: the list of runs, and one run with its curve."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.cli.folders import RUNS, find_folder
from trainer.errors import CheckpointError

if TYPE_CHECKING:
    from launch.report.listing import Entry

HEADS = ["name", "status", "step", "score", "size", "age"]
GO_ON = "how to go on"
STYLES = {"failed": "red", "broken": "red", "running": "cyan", "preempted": "yellow", "unfinished": "yellow"}


def runs(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="of runs", show_default=str(RUNS))] = RUNS,
    as_json: Annotated[bool, typer.Option("--json", help="print raw values, for scripts")] = False,
) -> int:
    """List what was trained, and how each run goes on.

    Status, step, score, size; the newest first.
    """
    from launch.report.listing import list_runs, record

    if not folder.is_dir():
        raise CheckpointError("folder", value=folder, reason="there is no such folder", hint="afina runs FOLDER")
    found = list_runs(folder)
    if as_json:
        print(json.dumps([record(entry) for entry in found], indent=1))
        return 0
    _write_whatever_there_is()
    if not found:
        print(f"no runs in {folder}; the first one: afina train experiment=demo")
        return 0
    _print_table(found)
    return 0


def show(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run folder, or the name of one in runs/")],
    svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE.svg", help="write the loss curve, too")] = None,
) -> int:
    """Show one run: scores, cost, loss curve, what to type next."""
    from launch.report import show as shown
    from launch.report.text_curve import Look

    if svg is not None:
        shown.check_svg(svg)
    reason, hint = "is no run folder", "afina runs lists them"
    report = shown.read(find_folder("run", run, shown.is_shown, reason, hint))
    _write_whatever_there_is()
    is_coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    print("\n".join(shown.lines(report, Look(_writes("⣿●┤→"), is_coloured))))
    if svg is not None:
        shown.write_svg(report, svg)
        print(f"written: {svg}")
    return 0


def _print_table(found: list[Entry]) -> None:
    """Print a row a run; where the terminal is too narrow for the commands, they stand below the table."""
    from launch import table
    from trainer.html import visible

    rows = [_row(entry) for entry in found]
    commands = [entry.next or "" for entry in found]
    lines = [HEADS + [GO_ON], *([*row, command] for row, command in zip(rows, commands, strict=True))]
    needed = sum(max(len(line[i]) for line in lines) + 3 for i in range(len(lines[0]))) + 1
    styles = [STYLES.get(entry.status) for entry in found]
    if not sys.stdout.isatty() or needed <= shutil.get_terminal_size().columns:
        table.show(lines[0], lines[1:], styles)
    else:
        table.show(HEADS, rows, styles)
        for entry, command in zip(found, commands, strict=True):
            if command:
                print(f"{visible(entry.folder.name)}: {command}")
    for entry in found:
        if entry.reason:
            print(f"{visible(entry.folder.name)}: {' '.join(visible(entry.reason).split())}")


def _row(entry: Entry) -> list[str]:
    from launch.report.show import age
    from trainer.html import visible
    from trainer.tracking.result import size_text

    step = "" if entry.step is None else str(entry.step)
    if entry.total_steps and entry.total_steps != entry.step:
        step = f"{step or 0}/{entry.total_steps}"
    if entry.kind in ("sweep", "comparison"):
        step = f"{entry.runs} runs"
    before = "" if entry.score_before is None else f"{entry.score_before:.4f} {'→' if _writes('→') else '->'} "
    score = "" if entry.score is None else f"{entry.metric} {before}{entry.score:.4f}"
    old = "" if entry.modified is None else age(time.time() - entry.modified)
    return [visible(entry.folder.name), visible(entry.status), step, score, size_text(entry.size_bytes), old]


def _write_whatever_there_is() -> None:
    """Let no letter of a name end a list: what the output's encoding does not have is written as its number."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        with suppress(OSError):  # where the descriptor below was exchanged for a pipe
            sys.stdout.reconfigure(errors="backslashreplace")


def _writes(text: str) -> bool:
    """Return whether the output's encoding has these letters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
