"""Verbs for jobs: how runs stand, their logs, stopping them, the batch script."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainer.cli.completion import complete_folder
from trainer.cli.folders import RUNS, find_folder
from trainer.cli.options import Overrides, Run
from trainer.tracking.logs import print_line

METAVAR, HELP = "RUN…", "run or sweep folders, or names of such in runs/"
Folders = Annotated[list[str], typer.Argument(metavar=METAVAR, help=HELP, autocompletion=complete_folder)]


def status(
    folders: Annotated[
        list[str] | None,
        typer.Argument(
            metavar=METAVAR, help=f"{HELP}; none: all in runs/", show_default=False, autocompletion=complete_folder
        ),
    ] = None,
) -> int:
    """Say how runs stand: step, who trains them, Slurm's word.

    Of these runs or sweeps, or of all in runs/.
    """
    from launch import jobs, table

    found = [jobs.standing(folder) for folder in _find_runs(folders or [])]
    rows = [[str(s.folder), s.status, "" if s.step is None else str(s.step), s.job or "", s.detail] for s in found]
    table.show(["run", "status", "step", "job", ""], rows)
    return 0


def logs(
    run: Run,
    lines: Annotated[int, typer.Option("--lines", "-n", help="so many of the last lines")] = 40,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="and what comes, until the run ends")] = False,
) -> int:
    """Show the log of a run."""
    from launch import jobs

    for line in jobs.follow(_find(run), lines, follow):
        print(line, end="", flush=True)
    return 0


def cancel(folders: Folders) -> int:
    """Stop runs so that they save, cancel their Slurm jobs.

    The same command goes on later. Of a sweep, those that run or wait are stopped.
    """
    from launch import jobs

    for typed in folders:
        runs = _runs_in(_find(typed))
        live = [run for run in runs if jobs.standing(run).is_live] if len(runs) > 1 else runs
        for run in live:
            print_line(jobs.stop(run))
        if not live:
            print_line(f"{typed}: none of its {len(runs)} runs is running or queued")
    return 0


def slurm_script(overrides: Overrides = None) -> int:
    """Print the batch script to adapt, with launch.* in it."""
    import trainer.config
    from launch.slurm.script import render

    config = trainer.config.load(["launch=slurm", *(overrides or [])], with_data=False)
    print(render(config), end="")
    return 0


def _find(typed: str) -> Path:
    reason = "is no folder of a run or a sweep"
    return find_folder("run", typed, lambda folder: bool(_runs_in(folder)), reason, "afina status lists runs/")


def _find_runs(typed: list[str]) -> list[Path]:
    if not typed:
        return _runs_in(RUNS) if RUNS.is_dir() else []
    return [run for each in typed for run in _runs_in(_find(each))]


def _runs_in(folder: Path) -> list[Path]:
    """Return the runs in a folder, those of the sweeps in it too; a run is its own."""
    from launch import jobs

    inside = [run for each in sorted(folder.iterdir()) if each.is_dir() for run in _run_or_trials(each)]
    return inside or ([folder] if jobs.is_run(folder) else [])


def _run_or_trials(folder: Path) -> list[Path]:
    """Return a run, or the trials of a sweep: its own folder may have been submitted as a job, too."""
    from launch import jobs

    trials = [each for each in sorted(folder.iterdir()) if each.is_dir() and jobs.is_run(each)]
    return trials or ([folder] if jobs.is_run(folder) else [])
