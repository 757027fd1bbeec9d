"""Render the overview as one HTML page that needs nothing but itself."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from trainer.errors import DataError
from trainer.files import write_atomically
from trainer.html import as_json, assemble, check_target, text, visible
from trainer.view import markup, words
from trainer.view.overview import Overview, ShownExample

IN_LOSS, CONTROL = 1, 2  # flags of a piece, as page.js reads them


def write(overview: Overview, path: Path) -> None:
    """Write the page: all of it or nothing, over a page that was there.

    Raises:
        ConfigError: as :func:`trainer.html.check_target`.
        DataError: the disk is full or fails.
    """
    check_target("--html", path)
    target = path.resolve()  # a link stays a link to the page
    content = render(overview).encode("utf-8", errors="backslashreplace")
    try:
        write_atomically(target, content)
    except OSError as error:
        raise DataError(
            "--html", value=path, reason=f"cannot be written ({error.strerror})", hint="make room"
        ) from error


def render(overview: Overview) -> str:
    """Render the page. The same overview gives the same bytes."""
    parts = {
        "title": text(words.data_title(overview)),
        "subtitle": markup.subtitle(overview),
        "verdict": markup.verdict(overview),
        "tiles": markup.tiles(overview),
        "lengths": markup.lengths(overview),
        "sharing": markup.sharing(overview),
        "findings": markup.findings(overview),
        "refused": markup.refused(overview),
        "footer": markup.footer(overview),
        "data": as_json([_example(example) for example in overview.examples]),
    }
    return assemble("data", asset("page.html"), parts, asset("page.css"), asset("page.js"))


def asset(name: str) -> str:
    """Read a file of this package."""
    return files("trainer.view").joinpath(name).read_text(encoding="utf-8")


def _example(example: ShownExample) -> dict[str, Any]:
    """Return an example as page.js reads it: ``pieces`` are ``[ids, text, flags]``."""
    pieces = [[p.ids, p.text, IN_LOSS * p.in_loss + CONTROL * p.control] for p in example.pieces]
    return {
        "name": visible(example.name),
        "held": example.held_out,
        "why": example.why,
        "tokens": example.tokens,
        "loss_tokens": example.loss_tokens,
        "pieces": pieces,
    }
