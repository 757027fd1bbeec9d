"""Hide secrets: the one redactor of all that is printed, written into a run folder, or sent to a tracker.

A secret is known by its shape (tokens of hubs and clouds, keys, passwords in URLs, signed URLs), by the name beside it
(``api_key=…``, ``"password": …``), or because an environment variable with such a name holds it.
"""

from __future__ import annotations

import os
import re
from typing import Any

HIDDEN = "<redacted>"
MIN_SECRET_LENGTH = 8  # of a variable's value: "true" in HF_HUB_DISABLE_IMPLICIT_TOKEN is no secret

# The last word of a name: `micro_tokens` and `tokenizer` hold none.
_NAME = r"(?:api_?key|access_?key(?:_?id)?|private_?key|token|secret|password|passwd|passphrase|credentials?|signature)"
_SECRET_NAME = re.compile(rf"{_NAME}$", re.IGNORECASE)
_PLAIN = re.compile(r"[-+.\d][\d.eE+_-]*|true|false|null|none|\[\]|<redacted>", re.IGNORECASE)
# "the end token: </s>" is prose: a bare word needs the equals sign.
_PAIR = re.compile(
    rf"""(?ix) ((?<![a-z0-9_]) [\w.-]{{0,64}}? (?:{_NAME} ["']? \s* =  | (?<![\s(]) {_NAME} ["']? \s* :)
    \s* (?:bearer\s+|basic\s+)?) ( "[^"\n]*" | '[^'\n]*' | [^\s,}}\])"'&;]+ )"""
)
_QUERY = re.compile(rf"(?i)([?&;](?:[\w.-]*{_NAME}|sig|key|auth|x-amz-[\w-]+|x-goog-[\w-]+)=)[^&\s\"'#]+")
_BEARER = re.compile(r"(?i)\b((?:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{16,}")
# Everything between `user:` and the last `@` that a host follows: passwords hold `@`, `/` and spaces. A port is none.
_PASSWORD = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^\s/@:]*:(?!\d{1,5}(?:[/?#\s]|$))[^\n]*@(?=[\w\[])")
_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/\s@]+@")
_SHAPES = tuple(
    re.compile(shape)
    for shape in (
        # Hugging Face: long, or short with a digit or capital in it, so that a folder such as hf_checkpoints is kept.
        r"hf_(?:[A-Za-z0-9]{16,}|(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{8,})",
        r"\b(?:sk|rk|pk)-(?=[\w-]*\d)[A-Za-z0-9_-]{16,}",  # OpenAI, Anthropic
        r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",  # AWS
        r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,})",
        r"\bxox[abeprs]-[A-Za-z0-9-]{10,}",  # Slack
        r"\bAIza[\w-]{30,}",  # Google
        r"\bwandb_v\d+_\w{16,}",
        r"\bey[A-Za-z0-9_-]{10,}\.ey[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",  # a JSON web token
        r"-----BEGIN [A-Z ]*PRIVATE KEY-----[^-]*(?:-----END [A-Z ]*PRIVATE KEY-----)?",
    )
)
# W&B's keys are 40 hexadecimal digits, and so are commits: those have their name, or the hub's cache, before them.
_BEFORE_COMMIT = r"(?:revision|commit|sha1?|snapshots|refs|blobs|tree|resolve)[\"']?[\s=:/]+[\"']?"
_HEX = re.compile(rf"({_BEFORE_COMMIT})?(?<![0-9a-fA-F])[0-9a-f]{{40}}(?![0-9a-fA-F])")
_COMMIT_NAME = re.compile(r"(?:revision|commit)$")


def is_secret_name(name: str) -> bool:
    """Return whether the name of a key or of a variable marks its value as a secret."""
    return _SECRET_NAME.search(name) is not None


def redact(text: str, name: str = "") -> str:
    """Return a text without the secrets in it.

    Args:
        text: any, of one line or several.
        name: of the key that it is the value of: a secret one hides all of it, and a revision is no secret.
    """
    if not text:
        return text
    if is_secret_name(name):
        return HIDDEN
    for variable, value in os.environ.items():
        if len(value) >= MIN_SECRET_LENGTH and is_secret_name(variable) and not _PLAIN.fullmatch(value):
            text = text.replace(value, HIDDEN)
    text = _USER.sub(rf"\1{HIDDEN}@", _PASSWORD.sub(rf"\1{HIDDEN}@", text))
    for shape in _SHAPES:
        text = shape.sub(HIDDEN, text)
    if not _COMMIT_NAME.search(name):
        text = _HEX.sub(lambda found: found[0] if found[1] else HIDDEN, text)
    text = _BEARER.sub(rf"\1{HIDDEN}", _QUERY.sub(rf"\1{HIDDEN}", text))
    return _PAIR.sub(lambda found: found[0] if _PLAIN.fullmatch(found[2].strip("\"'")) else found[1] + HIDDEN, text)


def redact_all(value: Any, name: str = "") -> Any:
    """Return nested dicts and lists with each text redacted by its key's name; other values are as they are."""
    if isinstance(value, dict):
        return {key: redact_all(child, str(key)) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(redact_all(child, name) for child in value)
    return redact(value, name) if isinstance(value, str) else value
