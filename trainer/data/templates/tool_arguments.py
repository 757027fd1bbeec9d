"""Give the arguments of tool calls as objects or as strings of JSON: chat templates differ in which they take."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from trainer.data.templates.skeleton import Message


def other_arguments(messages: list[Message], first: str = "") -> Iterator[tuple[str, list[Message]]]:
    """Yield the messages in each form that their tool calls can have, no form twice.

    Args:
        messages: of a conversation.
        first: the form to begin with: ``""`` (as they came), ``object`` or ``string``.

    Yields:
        The form, and the messages in it.
    """
    seen: list[list[Message]] = []
    for form in dict.fromkeys((first, "", "object", "string")):
        try:
            given = _with_arguments(messages, _CONVERT[form]) if form else messages
        except ValueError:  # a string that is no JSON has no other form
            continue
        if given not in seen:
            seen.append(given)
            yield form, given


def _with_arguments(messages: list[Message], convert: Callable[[Any], Any]) -> list[Message]:
    out = []
    for message in messages:
        if calls := message.get("tool_calls"):
            message = {**message, "tool_calls": [_converted(call, convert) for call in calls]}
        out.append(message)
    return out


def _converted(call: dict[str, Any], convert: Callable[[Any], Any]) -> dict[str, Any]:
    inner = call.get("function", call)
    if "arguments" not in inner:
        return call
    changed = {**inner, "arguments": convert(inner["arguments"])}
    return {**call, "function": changed} if "function" in call else changed


def _to_object(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    found = json.loads(given) if given.strip() else {}
    if not isinstance(found, dict):
        raise ValueError("arguments are no object")
    return found


def _to_string(given: Any) -> Any:
    return given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)


_CONVERT: dict[str, Callable[[Any], Any]] = {"object": _to_object, "string": _to_string}
