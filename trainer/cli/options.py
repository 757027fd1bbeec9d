"""Define the arguments and options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainer.cli.completion import complete_override, complete_run

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="OVERRIDES",
        help="key=value, group=option; a value with brackets or spaces in quotes",
        show_default=False,
        autocompletion=complete_override,
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="start from a run's config.yaml, or from the groups with the keys of your own YAML on top",
        rich_help_panel="Config",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="say what would be run, start nothing")]
Run = Annotated[
    str,
    typer.Argument(metavar="RUN", help="a run folder, or the name of one in runs/", autocompletion=complete_run),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="NAME=DIR",
        help="another adapter (of a run, or a folder) on the same base, or base alone; may be repeated",
        show_default=False,
    ),
]
NoAdapter = Annotated[bool, typer.Option("--no-adapter", help="the base in place of what the run trained")]
Bits = Annotated[int | None, typer.Option(metavar="16|8|4", help="hold the base in so many bits")]
