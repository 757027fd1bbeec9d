"""Verbs for jobs: how runs stand, their logs, stopping them, the batch script."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainer.cli.options import Overrides

Folders = Annotated[
    list[Path] | None,
    typer.Argument(metavar="RUN…", help="run or sweep folders; none: all in runs/", show_default=False),
]
Folder = Annotated[Path, typer.Argument(metavar="RUN", help="a run folder, or the name of one in runs/")]


def status(folders: Folders = None) -> int:
    """Say how runs stand: step, who trains them, what Slurm says. Of these runs or sweeps, or of all in runs/."""
    from launch import jobs, table

    found = [jobs.standing(folder) for given in folders or [Path("runs")] for folder in _runs_in(given)]
    rows = [[str(s.folder), s.status, "" if s.step is None else str(s.step), s.job or "", s.detail] for s in found]
    table.show(["run", "status", "step", "job", ""], rows)
    return 0


def logs(
    run: Folder,
    lines: Annotated[int, typer.Option("--lines", "-n", help="so many of the last lines")] = 40,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="and what comes, until the run ends")] = False,
) -> int:
    """Show the log of a run."""
    from launch import jobs

    for line in jobs.follow(find_folder(run), lines, follow):
        print(line, end="", flush=True)
    return 0


def cancel(folders: Annotated[list[Path], typer.Argument(metavar="RUN…", help="run or sweep folders")]) -> int:
    """Stop runs, so that they save: the same command goes on later. A Slurm job is cancelled."""
    from launch import jobs

    for given in folders:
        for folder in _runs_in(given):
            print(jobs.stop(folder))
    return 0


def slurm_script(overrides: Overrides = None) -> int:
    """Print the batch script with launch.* in it: afina slurm-script launch.partition=gpu > my.sbatch."""
    import trainer.config
    from launch.slurm.script import render

    config = trainer.config.load(["launch=slurm", *(overrides or [])], with_data=False)
    print(render(config), end="")
    return 0


def find_folder(given: Path) -> Path:
    """Return a folder as it is typed, or the run or sweep of that name."""
    from trainer.errors import ConfigError

    for folder in (given, Path("runs") / given, Path("sweeps") / given):
        if folder.is_dir():
            return folder
    raise ConfigError("RUN", value=given, reason="there is no such folder", hint="afina status lists runs/")


def _runs_in(given: Path) -> list[Path]:
    """Return the runs that a typed folder stands for: itself, or those in it."""
    from launch import jobs

    folder = find_folder(given) if given != Path("runs") else given
    if not folder.is_dir():
        return []
    inside = sorted(each for each in folder.iterdir() if each.is_dir() and jobs.is_run(each))
    if jobs.is_run(folder) and not inside:
        return [folder]
    # of a folder of runs, a sweep in it with its trials
    return [run for each in inside for run in (_runs_in(each) if folder != each else [each])]
