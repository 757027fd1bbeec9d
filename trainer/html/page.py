"""Assemble a page out of a template, and check where it goes.

Text from files reaches a page in two ways only: escaped in markup, and as JSON whose ``<``, ``>`` and ``&`` are written
as escapes, so nothing can end the script that carries it. The content policy allows exactly one script and one style
sheet, by their hashes; whatever else might get in would not run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from trainer.config.messages import config_error


def check_target(option: str, path: Path) -> None:
    """Refuse a place where a page cannot go, before any work is done for it.

    Args:
        option: that named it, for the message.
        path: of the page.

    Raises:
        ConfigError: the folder is missing or not writable, or the file is a folder or a device.
    """
    folder = path.resolve().parent
    if not folder.is_dir():
        raise config_error(option, path, f"there is no folder {folder}", f"mkdir -p {folder}")
    if path.is_dir():
        raise config_error(option, path, "must be a file, and this is a folder", f"{option} {path}/page.html")
    if path.exists() and not path.is_file():
        raise config_error(option, path, "must be a file, and this is a device or a pipe", f"{option} page.html")
    if not os.access(folder, os.W_OK):
        raise config_error(option, path, f"the folder {folder} cannot be written", "name another folder")


def assemble(what: str, body: str, parts: Mapping[str, str], style: str, script: str) -> str:
    """Put the parts into a page. The same parts give the same bytes.

    Args:
        what: the page is: ``report``, ``data``.
        body: the body element, with ``{{name}}`` for each part, and for ``script``.
        parts: markup; every text in it is escaped. ``title`` is one of them, the page's.
        style: of this page, behind the one that all pages share.
        script: of this page.
    """
    style = _own("base.css") + style
    policy = (
        f"default-src 'none'; style-src 'sha256-{_hash(style)}'; script-src 'sha256-{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    filled = {**parts, "what": what, "style": style, "script": script, "policy": policy}
    template = _own("page.html").replace("{{body}}", body)
    # in one pass over the template: nothing that is put in is looked through for more to put in
    return re.sub(r"\{\{(\w+)\}\}", lambda found: filled[found[1]], template)


def _own(name: str) -> str:
    return files("trainer.html").joinpath(name).read_text(encoding="utf-8")


def as_json(value: Any) -> str:
    """Serialize to JSON that may stand in a script element, whatever texts it holds."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029]", lambda letter: f"\\u{ord(letter[0]):04x}", text)


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
