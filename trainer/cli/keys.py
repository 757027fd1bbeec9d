"""Explain the keys of the config: ``afina config --keys WORD…``."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Sequence

from trainer.config import Key, groups, keys
from trainer.config.messages import config_error, in_grammar, listing
from trainer.tracking.logs import print_line, terminal_width

INDENT = "    "
BOLD, PLAIN = "\x1b[1m", "\x1b[0m"


def show_keys(words: Sequence[str]) -> None:
    """Print the keys whose name or meaning holds every word, all keys without one; wrapped to the terminal, 80 columns
    in a pipe.

    Raises:
        ConfigError: no key holds them; names what is near.
    """
    found = find_keys(words)
    width = terminal_width()
    is_styled = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    options = [f"{name}={'|'.join(groups()[name])}" for name in words if name in groups()]
    blocks = [_wrap(line, width, "") for line in options] + [explain(key, width) for key in found]
    for block in blocks:
        head, line_break, rest = block.partition("\n")
        print_line((f"{BOLD}{head}{PLAIN}" if is_styled else head) + line_break + rest)


def find_keys(words: Sequence[str]) -> list[Key]:
    """Return the keys whose name or meaning holds every word, those first that hold them in the name.

    Raises:
        ConfigError: there is none.
    """
    wanted = [word.partition("=")[0].lower() for word in words]
    named = [key for key in keys() if all(word in key.name for word in wanted)]
    meant = [key for key in keys() if all(word in f"{key.name} {key.help}".lower() for word in wanted)]
    found = [*named, *(key for key in meant if key not in named)]
    if found:
        return found
    raise config_error("--keys", " ".join(words), "no key has that in its name or meaning", _near(wanted))


def explain(key: Key, width: int) -> str:
    """Return a key with its default, its meaning and what it may be: the lines of ``width`` columns at most."""
    default = "required" if key.default == "???" else in_grammar(key.default)
    head = f"{key.name} = {default}"
    limits = f"{key.type.replace(' | ', ' or ')}: {key.limits}" if key.limits else key.type.replace(" | ", " or ")
    body = [_wrap(text, width, INDENT) for text in (key.help, f"({limits})")]
    return "\n".join([_wrap(head, width, ""), *body])


def _near(words: Sequence[str]) -> str:
    """Return what to look for instead: keys with a part of the name like one of the words."""
    import difflib

    parts: dict[str, list[str]] = {}
    for key in keys():
        for part in {key.name, key.name.partition(".")[2], *key.name.replace(".", "_").split("_")}:
            parts.setdefault(part, []).append(key.name)
    near = [name for word in words for part in difflib.get_close_matches(word, parts, n=2) for name in parts[part]]
    return f"did you mean {listing(list(dict.fromkeys(near))[:4])}" if near else "`afina config --keys` lists all"


def _wrap(text: str, width: int, indent: str) -> str:
    """Wrap at words, and long lists of values at their commas."""
    if len(indent + text) > width and " " not in text.replace(" = ", ""):
        text = text.replace(",", ", ").replace("|", " | ")
    lines = textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent or INDENT, break_on_hyphens=False
    )
    return "\n".join(lines)
