"""Say what a config file from somebody else may ask for: values, and nothing that happens to this machine.

A run folder, and what ``--config`` names, may come from anywhere. ``conf/`` and the command line are the user's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

from trainer.config.messages import config_error
from trainer.config.suggestions import config_fields

# ``${oc.env:NAME}`` and its like read this machine; ``${section.key}`` reads the file itself.
_CALL = re.compile(r"\$\{[^{}]*:")


def refuse_calls(tree: dict[str, Any], file: Path) -> None:
    """Refuse resolvers in a config file: they could send what this machine knows to wherever the file says.

    Raises:
        ConfigError: names the key and the file.
    """
    for name, text in texts_in(tree):
        if _CALL.search(text):
            reason = f"{file} asks for something of this machine; only conf/ and what is typed may"
            raise config_error(name, text, reason, f"write the value itself, or type {name}=…")


def take_no_grants(tree: dict[str, Any], file: Path, typed: Set[str]) -> None:
    """Leave out of ``tree`` what a file cannot grant and that was not typed again.

    Args:
        tree: of the file, by section; changed.
        file: that it was read from.
        typed: keys of the command line.

    Raises:
        ConfigError: the file asks for the code of its author to be run.
    """
    for name, spec in config_fields().items():
        section, _, key = name.partition(".")
        body = tree.get(section)
        if not spec.field.metadata["grants"] or not isinstance(body, dict) or not body.get(key) or name in typed:
            continue
        if name == "run.overwrite":  # it was typed for that run, once
            body[key] = False
            continue
        reason = f"{file} cannot grant that: {spec.field.metadata['help'].split(';')[0]}"
        raise config_error(name, body[key], reason, f"type {name}={str(body[key]).lower()} where you trust its author")


def texts_in(tree: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text below, keys too, with its dotted key."""
    if isinstance(tree, dict):
        for key, child in tree.items():
            here = f"{name}.{key}" if name else str(key)
            yield here, str(key)
            yield from texts_in(child, here)
    elif isinstance(tree, list):
        for child in tree:
            yield from texts_in(child, name)
    elif isinstance(tree, str):
        yield name, tree
