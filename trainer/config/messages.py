"""Build config errors of one line, and redact secrets in all that is printed or written."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from trainer.errors import ConfigError

HIDDEN = "<redacted>"
MAX_VALUE_LENGTH = 160

# A Hugging Face token: long, or short with a digit or capital in it, so that a folder such as hf_checkpoints is kept.
_TOKEN = re.compile(r"hf_(?:[A-Za-z0-9]{16,}|(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{8,})")
_CREDENTIALS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/\s@]+@")
_SECRET_PAIR = re.compile(r"(?i)([\w.-]*(?:token|secret|password|api_key)[\w-]*\s*[=:]\s*)([^\s,}]+)")
_NUMBER = re.compile(r"[-+.\d][\d.eE+_-]*|true|false|null|none", re.IGNORECASE)
_SECRET_KEY = re.compile(r"token|secret|password|api_key", re.IGNORECASE)


def is_secret_key(name: str) -> bool:
    """Return whether a key's name marks its value as a secret (only texts are: ``micro_tokens`` holds a number)."""
    return _SECRET_KEY.search(name) is not None


def redact(text: str) -> str:
    """Return ``text`` without Hugging Face tokens and without the credentials of URLs."""
    return _CREDENTIALS.sub(rf"\1{HIDDEN}@", _TOKEN.sub(HIDDEN, text))


def _redact_pairs(text: str) -> str:
    """Hide the value of each ``…token=VALUE`` that is not a number: a job's log may repeat what was typed."""

    def hide(match: re.Match[str]) -> str:
        return match[0] if _NUMBER.fullmatch(match[2]) else match[1] + HIDDEN

    return _SECRET_PAIR.sub(hide, text)


def one_line(value: object) -> str:
    """Return ``value`` as it is typed, on one line of bounded length, without secrets."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{','.join(one_line(item) for item in value)}]"
    text = " ".join(redact(str(value)).split())
    return text if len(text) <= MAX_VALUE_LENGTH else text[:MAX_VALUE_LENGTH] + "…"


def config_error(what: str, value: object, reason: str, hint: str) -> ConfigError:
    """Build a :class:`ConfigError` of one line without secrets.

    Args:
        what: the key.
        value: what was typed; ``...`` leaves it out of the message.
        reason: why it is refused.
        hint: what to type instead.
    """
    shown = None if value is ... else one_line(value)
    if shown and is_secret_key(what.rsplit(".", 1)[-1]) and not _NUMBER.fullmatch(shown):
        hint = hint.replace(shown, HIDDEN)
        shown = HIDDEN
    clean = [_redact_pairs(redact(" ".join(part.split()))) for part in (what, reason, hint)]
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
