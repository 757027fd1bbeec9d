"""Build config errors of one line, without secrets."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence

from trainer.errors import ConfigError
from trainer.redaction import HIDDEN, is_secret_name, redact

MAX_VALUE_LENGTH = 160

_PLAIN_WORD = re.compile(r"[A-Za-z/][\w./-]*", re.ASCII)
_NOT_WORDS = {"null", "true", "false", "inf", "nan", "yes", "no", "on", "off"}
_NUMBER = re.compile(r"[-+.\d][\d.eE+_-]*|true|false|null|none", re.IGNORECASE)


def one_line(value: object) -> str:
    """Return ``value`` as it is typed, on one line of bounded length, without secrets."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{','.join(one_line(item) for item in value)}]"
    text = " ".join(redact(str(value)).split())
    return text if len(text) <= MAX_VALUE_LENGTH else text[:MAX_VALUE_LENGTH] + "…"


def quote(value: str) -> str:
    """Quote a text so that Hydra's grammar of overrides reads exactly this text."""
    if _PLAIN_WORD.fullmatch(value) and value.lower() not in _NOT_WORDS:
        return value
    # there a backslash is itself, but before a quote it escapes
    escaped = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), value)
    return f'"{escaped}"'


def in_grammar(value: object) -> str:
    """Return a value in Hydra's grammar of overrides: texts quoted where they must be, lists and mappings too."""
    if isinstance(value, str):
        return quote(value)
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{in_grammar(item)}' for key, item in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(in_grammar, value))}]"
    return one_line(value)


def as_typed(key: str, value: object) -> str:
    """Return an override as it must be typed into a shell: ``as_typed("compare.methods", ["lora r=8", "full"])`` is
    ``'compare.methods=["lora r=8",full]'``."""
    return shlex.quote(f"{key}={in_grammar(value)}")


def in_shell(key: str, text: str) -> str:
    """Return an override, its value in Hydra's grammar already, as it must be typed into a shell."""
    return shlex.quote(f"{key}={text}")


def config_error(what: str, value: object, reason: str, hint: str) -> ConfigError:
    """Build a :class:`ConfigError` of one line without secrets.

    Args:
        what: the key.
        value: what was typed; ``...`` leaves it out of the message.
        reason: why it is refused.
        hint: what to type instead.
    """
    shown = None if value is ... else one_line(value)
    if shown and is_secret_name(what) and not _NUMBER.fullmatch(shown):
        hint = hint.replace(shown, HIDDEN)
        shown = HIDDEN
    clean = [redact(" ".join(part.split())) for part in (what, reason, hint)]
    return ConfigError(clean[0], value=shown, reason=clean[1], hint=clean[2])


def nearest(word: str, options: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the option most like ``word``, or ``None``. Letter case does not count."""
    by_lower = {option.lower(): option for option in options}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[close[0]] if close else None


def listing(options: Sequence[object]) -> str:
    """Join options as ``a, b or c``."""
    names = [one_line(option) for option in options]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
