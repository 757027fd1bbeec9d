"""Show text of anybody's: nothing in it that a terminal or a page would obey, and nothing that cannot be seen."""

from __future__ import annotations

import unicodedata
from functools import cache
from html import escape

JOINERS = "\u200c\u200d"  # between letters and in emoji they are part of the word


def text(value: object) -> str:
    """Escape a value for markup, attributes too, and name the characters in it that cannot be seen."""
    return escape(visible(str(value)))


def visible(text: str) -> str:
    """Return ``text`` without what cannot be seen or would be obeyed (escape codes, changes of direction, zero width):
    such characters are named, as ``⟨U+001B⟩``. Newlines and tabs stay."""
    return text if text.isascii() and text.isprintable() else "".join(map(_visible, text))


@cache
def _visible(letter: str) -> str:
    if letter in "\n\t" or letter in JOINERS:
        return letter
    hidden = unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
    return f"⟨U+{ord(letter):04X}⟩" if hidden else letter
