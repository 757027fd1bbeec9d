"""Render the overview as one HTML page that needs nothing but itself: no network, no other file.

Text from the data reaches the page in two ways only: escaped in markup, and as JSON whose ``<``, ``>`` and ``&`` are
written as escapes, so no row can end the script that carries it. The content policy allows exactly one script and one
style sheet, by their hashes; whatever else might get in would not run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from trainer.config.messages import config_error
from trainer.errors import DataError
from trainer.files import write_atomically
from trainer.view import markup, words
from trainer.view.overview import Overview, ShownExample
from trainer.view.pieces import visible

IN_LOSS, CONTROL = 1, 2  # flags of a piece, as page.js reads them


def check_target(path: Path) -> None:
    """Refuse a place where the page cannot go, before any work is done for it.

    Raises:
        ConfigError: the folder is missing or not writable, or the file is a folder or a device.
    """
    folder = path.resolve().parent
    if not folder.is_dir():
        raise config_error("--html", path, f"there is no folder {folder}", f"mkdir -p {folder}")
    if path.is_dir():
        raise config_error("--html", path, "must be a file, and this is a folder", f"--html {path}/data.html")
    if path.exists() and not path.is_file():
        raise config_error("--html", path, "must be a file, and this is a device or a pipe", "--html data.html")
    if not os.access(folder, os.W_OK):
        raise config_error("--html", path, f"the folder {folder} cannot be written", "name another folder")


def write(overview: Overview, path: Path) -> None:
    """Write the page: all of it or nothing, over a page that was there.

    Raises:
        ConfigError: as :func:`check_target`.
        DataError: the disk is full or fails.
    """
    check_target(path)
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
    style, script = asset("page.css"), asset("page.js")
    parts = {
        "style": style,
        "style_hash": _hash(style),
        "script": script,
        "script_hash": _hash(script),
        "title": markup.text(words.data_title(overview)),
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
    # in one pass over the template: nothing that is put in is looked through for more to put in
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], asset("page.html"))


def asset(name: str) -> str:
    """Read a file of this package."""
    return files("trainer.view").joinpath(name).read_text(encoding="utf-8")


def as_json(value: Any) -> str:
    """Serialize to JSON that may stand in a script element, whatever texts it holds."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029]", lambda letter: f"\\u{ord(letter[0]):04x}", text)


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


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
