"""Write what a report is made of: the page, and the raw numbers beside it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from launch import table
from launch.report import page, rows, terminal
from launch.report.gather import gather, is_reportable
from trainer.config.messages import config_error
from trainer.errors import CheckpointError
from trainer.files import write_atomically
from trainer.html import check_target

PAGE = "report.html"

logger = logging.getLogger(__name__)


def report(what: str, to: Path | None = None) -> list[Path]:
    """Show a run, a sweep or a comparison on stdout, and write its page and its CSV.

    Args:
        what: its folder, or its name in runs/.
        to: the page's file; ``None``: ``report.html`` in the folder. The CSV stands beside it.

    Returns:
        The files that were written.

    Raises:
        CheckpointError: there is no run.
        ConfigError: there cannot be a page at ``to``; raised before anything is read.
    """
    folder = find_folder(what)
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


def find_folder(what: str) -> Path:
    """Return the folder of a run, a sweep or a comparison, by its path or by its name in runs/.

    Raises:
        CheckpointError: there is none; the nearest name in runs/ is suggested.
    """
    for folder in (Path(what), Path("runs") / what):
        if folder.is_dir() and is_reportable(folder):
            return folder
    names = [path.name for path in Path("runs").glob("*") if path.is_dir() and is_reportable(path)]
    near = get_close_matches(Path(what).name, names, n=1)
    hint = f"did you mean runs/{near[0]}?" if near else "give the folder that `afina train` or `afina sweep` wrote"
    raise CheckpointError("report", value=what, reason="is no folder of a run, a sweep or a comparison", hint=hint)


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
