"""Write what a report is made of: the page, and the raw numbers beside it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from launch import table
from launch.report import page, rows, terminal
from launch.report.gather import gather
from trainer.config.messages import config_error
from trainer.files import write_atomically
from trainer.html import check_target

PAGE = "report.html"

logger = logging.getLogger(__name__)


def report(folder: Path, to: Path | None = None) -> list[Path]:
    """Show a run, a sweep or a comparison on stdout, and write its page and its CSV.

    Args:
        folder: of it.
        to: the page's file; ``None``: ``report.html`` in the folder. The CSV stands beside it.

    Returns:
        The files that were written.

    Raises:
        CheckpointError: there is no run.
        ConfigError: there cannot be a page at ``to``; raised before anything is read.
    """
    file = folder / PAGE if to is None else to
    if file.suffix.lower() not in (".html", ".htm"):
        raise config_error("--to", file, "must end in .html", f"--to {file.with_suffix('.html')}")
    check_target("--to", file)
    gathered = gather(folder)
    terminal.show(gathered)
    numbers = file.with_suffix(".csv")
    write_atomically(numbers, table.to_csv(rows.records(gathered)).encode("utf-8", errors="backslashreplace"))
    page.write(gathered, file)
    return [file, numbers]


def end_with_page(folder: Path, written: Sequence[Path]) -> None:
    """Write the page of a sweep or a comparison that has ended, and log which files there are.

    A page that cannot be written is a warning: the runs are there, and `afina report` makes it again.

    Args:
        folder: of the sweep or the comparison; its table is in it.
        written: what has been written before.
    """
    files = [file for file in written if file.exists()]
    try:
        page.write(gather(folder), folder / PAGE)
        files.append(folder / PAGE)
    except Exception as error:  # whatever it is: days of training must not end in it
        logger.warning(f"the page could not be written ({type(error).__name__}: {error}) → afina report {folder}")
    logger.info(f"written: {', '.join(map(str, files))}")
