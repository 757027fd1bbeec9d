"""Parse lists of messages into turns: OpenAI's ``messages``, ShareGPT's ``conversations``, Gemini's ``contents``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from trainer.config.messages import as_typed, nearest
from trainer.data.formats.fields import is_nothing, require_text, wrong_type
from trainer.data.formats.shapes import as_list
from trainer.data.formats.tool_calls import CALL_ROLES, check_strings, parse_tool_calls
from trainer.data.formats.turns import Turn
from trainer.data.sources.rows import RowError

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", *CALL_ROLES), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "ipython"), "tool"),
}
ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value", "parts")  # OpenAI, ShareGPT, Gemini
# What others call these keys; `data.columns` reaches them.
ROLE_ALIASES = ("speaker", "author", "sender", "who")
CONTENT_ALIASES = ("text", "utterance", "message", "body", "said")
# Keys of a message that chat templates read; anything else (ids, times) is dropped.
EXTRA_KEYS = ("tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking")
_LOSS_KEYS = frozenset(("weight", "train", "loss"))  # OpenAI, Axolotl, ms-swift
MEDIA = ("image", "images", "image_url", "input_image", "audio", "audios", "input_audio", "video", "videos", "file")
_TEXT_PARTS = ("text", "input_text", "output_text")
_READ = {*ROLE_KEYS, *CONTENT_KEYS, *EXTRA_KEYS, *_LOSS_KEYS, "function_call", "tools"}


@dataclass(frozen=True, slots=True)
class MessageKeys:
    """How the messages of a data set are read.

    Attributes:
        columns: ``role`` and ``content`` -> the messages' own keys, where they differ.
        unused: gathers the keys of messages that are not read.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    unused: set[str] = field(default_factory=set)

    def find(self, message: Mapping[str, Any], name: str, usual: tuple[str, ...]) -> str:
        """Return the key under which a message has its ``role`` or ``content``."""
        if name in self.columns:
            return self.columns[name]
        if message.get(usual[0]) is not None:
            return usual[0]
        there = [key for key in usual if key in message]
        return next((key for key in there if message[key] is not None), there[0] if there else name)


def parse_turns(where: str, value: Any, answers: bool, keys: MessageKeys | None = None) -> list[Turn]:
    """Parse the turns of a list of messages.

    Args:
        where: the place of the list.
        value: ``[{"role": …, "content": …}, …]``, ``[{"from": …, "value": …}, …]``, and what else means one of these.
        answers: whether its assistant turns are the row's answers.
        keys: how messages are read.

    Raises:
        RowError: it is no such list, a role is unknown, a message has no text, or an assistant says nothing.
    """
    value = as_list(where, value, "messages") if not isinstance(value, str) or value.lstrip()[:1] in "[{" else value
    if not isinstance(value, list):
        raise wrong_type(where, value, "a list of messages", 'write [{"role": "user", "content": "…"}, …]')
    if not value:
        raise RowError("bad_turns", where, reason="is an empty list", hint="remove the row")
    keys = keys or MessageKeys()
    turns: list[Turn] = []
    for i, message in enumerate(value):
        turn = _parse_turn(f"{where}[{i}]", message, answers, keys)
        if (
            turns
            and turn.extra
            and _is_written_call(message, turn)
            and _is_written_call(value[i - 1], turns[-1], turn.weight)
        ):
            calls = [*(turns[-1].extra or {})["tool_calls"], *(turn.extra or {})["tool_calls"]]
            turns[-1] = replace(turns[-1], extra={**(turns[-1].extra or {}), "tool_calls": calls})
        else:
            turns.append(turn)
    return turns


def _is_written_call(message: Any, turn: Turn, weight: int | None = None) -> bool:
    """Return whether a message is a ``tool_call``: several in a row are one turn with several calls (ms-swift)."""
    is_call = str(message.get("role", message.get("from"))).lower() == "tool_call" and not turn.text
    return is_call and weight in (None, turn.weight)


def _parse_turn(where: str, message: Any, answers: bool, keys: MessageKeys) -> Turn:
    if not isinstance(message, dict):
        raise wrong_type(where, message, "a message", 'write {"role": "user", "content": "…"}')
    written_role, role = _parse_role(where, message, keys)
    key = keys.find(message, "content", CONTENT_KEYS)
    extra = {name: message[name] for name in EXTRA_KEYS if message.get(name)}
    calls = parse_tool_calls(where, message, written_role, message.get(key))
    if calls:
        if role != "assistant":
            reason = "only the assistant calls tools"
            raise RowError("bad_turns", f"{where}.tool_calls", reason=reason, hint="fix the role")
        extra["tool_calls"] = calls
    if role == "system" and message.get("tools"):
        extra["tools"] = message["tools"]
    _note_unused(where, message, keys, key)
    weight = _parse_weight(where, message) if not _LOSS_KEYS.isdisjoint(message) else 1
    if calls and (written_role in CALL_ROLES or message.get(key) is None):
        text = ""
    elif key not in message:
        raise _missing(where, message, "content", CONTENT_ALIASES, key, "give the message its `content`")
    else:
        text, thought = _parse_content(f"{where}.{key}", message[key], role)
        if thought and not extra.get("reasoning_content"):
            extra["reasoning_content"] = thought
    if extra:
        check_strings(where, extra)
    if role != "assistant":
        return Turn(role, text, extra=extra or None)
    if not calls:
        require_text(f"{where}.{key}", text, empty="empty_answer")
    return Turn(role, text, answer=answers, weight=weight, extra=extra or None)


def _parse_role(where: str, message: dict[str, Any], keys: MessageKeys) -> tuple[str, str]:
    """Return the role as it is written, in lower case, and ours."""
    key = keys.find(message, "role", ROLE_KEYS)
    if key not in message:
        raise _missing(where, message, "role", ROLE_ALIASES, key, "say who speaks: user, assistant …")
    written = message[key]
    if not isinstance(written, str) or written.lower() not in ROLES:
        near = nearest(written, ROLES) if isinstance(written, str) else None
        hint = f"did you mean {near}" if near else f"one of {', '.join(ROLES)}"
        raise RowError("bad_role", f"{where}.{key}", value=ascii(written)[:60], reason="is no known role", hint=hint)
    return written.lower(), ROLES[written.lower()]


def _missing(
    where: str, message: dict[str, Any], name: str, aliases: tuple[str, ...], key: str, otherwise: str
) -> RowError:
    found = next((alias for alias in aliases if alias in message), None)
    hint = as_typed("data.columns", {name: found}) if found else otherwise
    return RowError("missing_field", f"{where}.{key}", reason="is missing", hint=hint)


def _note_unused(where: str, message: dict[str, Any], keys: MessageKeys, content: str) -> None:
    """Note what nobody reads of a message, and refuse what changes its meaning."""
    for name, value in message.items():
        if name in _READ or name == content or name in keys.columns.values() or is_nothing(value):
            continue
        if name in MEDIA:
            raise holds_media(f"{where}.{name}", name)
        keys.unused.add(name)


def holds_media(where: str, kind: str) -> RowError:
    """Build the error for a row that is about more than its text."""
    reason = f"holds {kind}, and only text is trained on: the answer would be to something that the model never sees"
    return RowError(
        "media", where, reason=reason, hint="leave such rows out, or take that field out of those that can do without"
    )


def _parse_content(where: str, value: Any, role: str) -> tuple[str, str]:
    """Return a string, the texts of a list of content parts put together, or the JSON text of what a tool gives back as
    an object; and what is thought in the parts."""
    if role == "tool" and isinstance(value, dict):
        return require_text(where, json.dumps(value, ensure_ascii=False)), ""
    if not isinstance(value, list):
        return require_text(where, value), ""
    texts, thoughts = [], []
    for i, part in enumerate(value):
        kind = part.get("type", "text" if "text" in part else None) if isinstance(part, dict) else type(part).__name__
        if kind in _TEXT_PARTS:
            texts.append(require_text(f"{where}[{i}].text", part.get("text")))
        elif kind == "thinking":
            thoughts.append(require_text(f"{where}[{i}].thinking", part.get("thinking", part.get("text"))))
        elif kind in MEDIA:
            raise holds_media(f"{where}[{i}]", str(kind))
        else:
            shown = ascii(kind or sorted(part))[:60]
            reason = "is not text, and only text is trained on"
            raise RowError("wrong_type", f"{where}[{i}]", value=shown, reason=reason, hint="remove the row")
    return "".join(texts), "\n".join(thoughts)


def _parse_weight(where: str, message: dict[str, Any]) -> int:
    """Parse whether a message is in the loss: ``weight`` 0 or 1, ``train`` or ``loss`` true or false."""
    found: dict[str, int] = {}
    for key in sorted(_LOSS_KEYS):
        value = message.get(key)
        if value is None:
            continue
        if (key == "weight" and isinstance(value, bool)) or not isinstance(value, int | float) or value not in (0, 1):
            no, yes = ("0", "1") if key == "weight" else ("false", "true")
            reason, hint = f"must be {no} (not in the loss) or {yes}", f"{key}: {no} or {yes}"
            raise RowError("bad_weight", f"{where}.{key}", value=ascii(value)[:60], reason=reason, hint=hint)
        found[key] = int(value)
    if len(set(found.values())) > 1:
        reason = f"is said both to be in the loss and not to be ({', '.join(found)})"
        raise RowError("bad_weight", where, reason=reason, hint="leave one of them")
    return next(iter(found.values()), 1)
