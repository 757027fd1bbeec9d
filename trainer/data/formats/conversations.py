"""Parse lists of messages into turns: OpenAI's ``messages`` and ShareGPT's ``conversations``."""

from __future__ import annotations

import json
from typing import Any

from trainer.config.messages import nearest
from trainer.data.formats.fields import require_text, strings_in, wrong_type
from trainer.data.formats.turns import Turn
from trainer.data.sources.rows import RowError

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
# Keys of a message that chat templates read; anything else (ids, times) is dropped.
EXTRA_KEYS = ("tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking")


def parse_turns(where: str, value: Any, answers: bool) -> list[Turn]:
    """Parse the turns of a list of messages.

    Args:
        where: the place of the list.
        value: ``[{"role": …, "content": …}, …]`` or ``[{"from": …, "value": …}, …]``.
        answers: whether its assistant turns are the row's answers.

    Raises:
        RowError: it is no such list, a role is unknown, a message has no text, or an assistant says nothing.
    """
    if not isinstance(value, list):
        raise wrong_type(where, value, "a list of messages", 'write [{"role": "user", "content": "…"}, …]')
    if not value:
        raise RowError("bad_turns", where, reason="is an empty list", hint="remove the row")
    return [_parse_turn(f"{where}[{i}]", message, answers) for i, message in enumerate(value)]


def parse_tools(where: str, value: Any) -> tuple[Any, ...] | None:
    """Parse tool definitions: a list of objects, or that list as a JSON string; ``None`` when there are none.

    Raises:
        RowError: it is something else.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError(
                "wrong_type", where, reason=f"is not JSON ({error})", hint="give a list of objects"
            ) from error
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise wrong_type(where, value, "a list of objects", "give each tool as a JSON schema")
    _check_strings(where, value)
    return tuple(value)


def _parse_turn(where: str, message: Any, answers: bool) -> Turn:
    if not isinstance(message, dict):
        raise wrong_type(where, message, "a message", 'write {"role": "user", "content": "…"}')
    written_role, role = _parse_role(where, message)
    extra = {key: message[key] for key in EXTRA_KEYS if message.get(key)}
    calls = _parse_tool_calls(where, message, written_role)
    if calls:
        extra["tool_calls"] = calls
    _check_strings(where, extra)
    key = "value" if "content" not in message and "value" in message else "content"
    weight = _parse_weight(f"{where}.weight", message.get("weight"))
    if calls and (written_role == "function_call" or message.get(key) is None):
        text = ""
    elif key not in message:
        raise RowError("missing_field", f"{where}.{key}", reason="is missing", hint="give the message its `content`")
    else:
        text = _parse_content(f"{where}.{key}", message[key], role)
    if role != "assistant":
        return Turn(role, text, extra=extra or None)
    if not calls:
        require_text(f"{where}.{key}", text, empty="empty_answer")
    return Turn(role, text, answer=answers, weight=weight, extra=extra or None)


def _parse_role(where: str, message: dict[str, Any]) -> tuple[str, str]:
    """Return the role as it is written, and ours."""
    key = "from" if "role" not in message and "from" in message else "role"
    if key not in message:
        raise RowError("missing_field", f"{where}.{key}", reason="is missing", hint="say who speaks: user, assistant …")
    written = message[key]
    if not isinstance(written, str) or written not in ROLES:
        near = nearest(written, ROLES) if isinstance(written, str) else None
        hint = f"did you mean {near}" if near else f"one of {', '.join(ROLES)}"
        raise RowError("bad_role", f"{where}.{key}", value=ascii(written)[:60], reason="is no known role", hint=hint)
    return written, ROLES[written]


def _parse_content(where: str, value: Any, role: str) -> str:
    """Return a string, or the texts of a list of content parts put together; the JSON text of what a tool gives back as
    an object."""
    if role == "tool" and isinstance(value, dict):
        return require_text(where, json.dumps(value, ensure_ascii=False))
    if not isinstance(value, list):
        return require_text(where, value)
    texts = []
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            reason = "is not text, and only text is trained on"
            raise RowError("wrong_type", f"{where}[{i}]", value=ascii(kind)[:60], reason=reason, hint="remove the row")
        texts.append(require_text(f"{where}[{i}].text", part.get("text")))
    return "".join(texts)


def _parse_weight(where: str, value: Any) -> int:
    if value is None:
        return 1
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in (0, 1):
        reason = "must be 0 (not in the loss) or 1"
        raise RowError("bad_weight", where, value=ascii(value)[:60], reason=reason, hint="weight: 0 or 1")
    return int(value)


def _parse_tool_calls(where: str, message: dict[str, Any], written_role: str) -> list[Any]:
    """Parse the tool calls of a message, older ways of writing them included; empty when it makes none."""
    calls = message.get("tool_calls")
    if not calls and isinstance(message.get("function_call"), dict):
        calls = [{"type": "function", "function": message["function_call"]}]
    if not calls and written_role == "function_call":
        calls = _parse_sharegpt_calls(message.get("value", message.get("content")))
    if not calls:
        return []
    if ROLES[written_role] != "assistant":
        raise RowError("bad_turns", f"{where}.tool_calls", reason="only the assistant calls tools", hint="fix the role")
    if not isinstance(calls, list):
        raise wrong_type(f"{where}.tool_calls", calls, "a list of calls", "write [{…}]")
    for i, call in enumerate(calls):
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
            reason = "names no function"
            hint = 'write {"type": "function", "function": {"name": "…", "arguments": {…}}}'
            raise RowError("wrong_type", f"{where}.tool_calls[{i}]", value=ascii(call)[:60], reason=reason, hint=hint)
    return calls


def _parse_sharegpt_calls(value: Any) -> list[Any]:
    """Parse ShareGPT's ``function_call``: JSON in a string, one call or several; anything else is text, and no call."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return []
    found = found if isinstance(found, list) else [found]
    if not all(isinstance(call, dict) and "name" in call and "arguments" in call for call in found):
        return []
    return [{"type": "function", "function": call} for call in found]


def _check_strings(where: str, value: Any) -> None:
    for text in strings_in(value):
        require_text(where, text)
