"""Define the arguments and options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="OVERRIDES", help="key=value, group=choice, +new.key=value, ~key", show_default=False),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="start from a run's config.yaml, or from the groups with the keys of your own YAML on top",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="say what would be run, start nothing")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="a run folder, or the name of one in runs/")]
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
