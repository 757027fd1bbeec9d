"""Verbs that train nothing: show the config, this machine, the data, what came out; fetch a model; print versions."""

from __future__ import annotations

import logging
import platform
import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.cli.completion import complete_embedded, complete_folder
from trainer.cli.folders import find_folder
from trainer.cli.options import ConfigFile, Overrides
from trainer.errors import LaunchError
from trainer.tracking.logs import print_line

if TYPE_CHECKING:
    from trainer.config import TrainConfig

logger = logging.getLogger(__name__)


def config(
    overrides: Overrides = None,
    config_file: ConfigFile = None,
    keys: Annotated[bool, typer.Option("--keys", help="explain the keys that hold these words, or all")] = False,
) -> None:
    """Print the composed config, or with --keys explain keys.

    On top of the YAML: which file each group came from.
    """
    import trainer.config

    if keys:
        from trainer.cli.keys import show_keys

        show_keys(overrides or [])
        return
    print_config(trainer.config.load(overrides or [], config_file), overrides or [], config_file)


def doctor(
    overrides: Overrides = None,
    config_file: ConfigFile = None,
    ranks: Annotated[
        int | None, typer.Option("--ranks", metavar="N", min=1, help="let N processes meet here, and measure them")
    ] = None,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="every method × base precision × ZeRO stage, every optimizer")
    ] = False,
) -> int:
    """Say if this machine, or allocation, can run the job.

    Each check with its cure; exit code 4 where one failed.
    """
    import trainer.config
    from launch import table
    from launch.doctor.finding import HEADS, STYLES, has_failed

    if matrix:
        print_matrix()
        return 0
    from launch.doctor.check import check_all
    from launch.doctor.ranks import measure_ranks

    config = trainer.config.load(overrides or [], config_file, with_data=False)
    logger.info("checking this machine")
    findings = check_all(config)
    table.show(HEADS, [finding.row() for finding in findings], [STYLES[finding.state] for finding in findings])
    sys.stdout.flush()  # before what the ranks print
    code = LaunchError.exit_code if has_failed(findings) else 0
    if ranks is None:
        return code
    print(flush=True)
    return LaunchError.exit_code if measure_ranks(config, ranks) else code


def data(
    overrides: Overrides = None,
    config_file: ConfigFile = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="write a page to look at, too")] = None,
    examples: Annotated[int, typer.Option("--examples", metavar="N", min=0, help="rows shown token by token")] = 3,
) -> None:
    """Check and show the rows, token by token. No model.

    The loss mask, lengths, shared prefixes, refused rows.
    """
    import trainer.config
    from trainer.view import view

    view(trainer.config.load(overrides or [], config_file), html, examples)


def report(
    what: Annotated[
        str,
        typer.Argument(
            metavar="RUN|SWEEP|COMPARISON", help="a folder, or the name of one in runs/", autocompletion=complete_folder
        ),
    ],
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FILE.html", help="the page; default: report.html in that folder")
    ] = None,
) -> None:
    """Show what came out: a ranked table and a page to send.

    Raw numbers as CSV, too. No network.
    """
    from launch.report import write
    from launch.report.gather import is_reportable

    reason = "is no folder of a run, a sweep or a comparison"
    hint = "give the folder that `afina train` or `afina sweep` wrote"
    folder = find_folder("report", what, is_reportable, reason, hint)
    logger.info(f"reading {folder}")
    files = write.report(folder, to)
    print_line(f"written: {', '.join(map(str, files))}")


def fetch(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="an embedded model", autocompletion=complete_embedded)
    ] = None,
) -> None:
    """Fetch an embedded model; without a name, list them.

    The last line is its folder.
    """
    import trainer.models.embedded

    if name is None:
        for embedded in trainer.models.embedded.EMBEDDED:
            print(embedded)
    else:
        print(trainer.models.embedded.fetch(name))


def version() -> None:
    """Print the versions that a number depends on."""
    lines = []
    for library in ("afina", "torch", "deepspeed", "transformers", "peft", "bitsandbytes", "hydra-core"):
        try:
            lines.append(f"{library} {package_version(library)}")
        except PackageNotFoundError:
            lines.append(f"{library} not installed")
    print("\n".join([lines[0], f"python {platform.python_version()}", *lines[1:]]))


def print_matrix() -> None:
    """Print what goes with what, and why some of it does not."""
    from launch import table
    from launch.doctor.matrix import build_matrix, build_optimizer_matrix, count_cells

    counted, said = [], []
    for heads, rows, notes in (build_matrix(), build_optimizer_matrix()):
        table.show(heads, rows)
        print_line("")
        counted.append(count_cells(rows))
        said += notes
    works, refused = (sum(each) for each in zip(*counted, strict=True))
    print_line("\n".join([f"{works} cells work, {refused} are refused", *said]))


def print_config(config: TrainConfig, overrides: list[str], config_file: Path | None) -> None:
    """Print a composed config; where each group came from stands on top as comments, so that it stays YAML."""
    import trainer.config

    for group, file in trainer.config.sources(overrides, config_file).items():
        print(f"# {group}: {file}")
    print(trainer.config.to_yaml(config), end="")
