"""Parse tool definitions and tool calls, older ways of writing them included."""

from __future__ import annotations

import json
from typing import Any

from trainer.data.formats.fields import RowFields, require_text, strings_in, wrong_type
from trainer.data.formats.shapes import as_list
from trainer.data.sources.rows import RowError

CALL_ROLES = ("function_call", "tool_call")  # of messages that hold a call as JSON (ShareGPT, ms-swift)


def parse_tools(fields: RowFields, of_system: Any = None) -> tuple[Any, ...] | None:
    """Parse the tools of a row: its ``tools``, OpenAI's older ``functions``, or what its system message holds.

    Args:
        fields: of the row.
        of_system: ``tools`` of the system message (Phi-4-mini).

    Returns:
        A list of objects; ``None`` when there are none.

    Raises:
        RowError: it is something else, or there are two that differ.
    """
    tools = _parse_tools(fields.where("tools"), fields.get("tools"))
    functions = _parse_tools(fields.where("functions"), fields.get("functions"))
    wrapped = functions and tuple(f if "function" in f else {"type": "function", "function": f} for f in functions)
    inner = _parse_tools(f"{fields.row.where} tools of the system message", of_system)
    given = [found for found in (tools, wrapped, inner) if found]
    if any(found != given[0] for found in given[1:]):
        reason = "and other tools stand in `functions` or in the system message"
        raise RowError("wrong_type", fields.where("tools"), reason=reason, hint="leave one")
    return given[0] if given else None


def _parse_tools(where: str, value: Any) -> tuple[Any, ...] | None:
    value = as_list(where, value, "objects")
    if not value or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise wrong_type(where, value, "a list of objects", "give each tool as a JSON schema")
    check_strings(where, value)
    return tuple(value)


def parse_tool_calls(where: str, message: dict[str, Any], written_role: str, said: Any) -> list[Any]:
    """Parse the tool calls of a message; empty when it makes none.

    Args:
        where: the message's place.
        message: as it is written.
        written_role: in lower case, as it is written.
        said: the message's content.

    Raises:
        RowError: a call names no function, or another than the assistant calls.
    """
    calls = message.get("tool_calls")
    if not calls and isinstance(message.get("function_call"), dict):
        calls = [{"type": "function", "function": message["function_call"]}]
    if not calls and written_role in CALL_ROLES:
        calls = _parse_written_calls(said)
    if not calls:
        return []
    calls = as_list(f"{where}.tool_calls", calls, "calls")
    if not isinstance(calls, list):
        raise wrong_type(f"{where}.tool_calls", calls, "a list of calls", "write [{…}]")
    for i, call in enumerate(calls):
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
            reason = "names no function"
            hint = 'write {"type": "function", "function": {"name": "…", "arguments": {…}}}'
            raise RowError("wrong_type", f"{where}.tool_calls[{i}]", value=ascii(call)[:60], reason=reason, hint=hint)
    return calls


def _parse_written_calls(value: Any) -> list[Any]:
    """Parse the content of a message that is a call: JSON in a string, one call or several; anything else is text."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return []
    found = found if isinstance(found, list) else [found]
    if not all(isinstance(call, dict) and "name" in call and "arguments" in call for call in found):
        return []
    return [{"type": "function", "function": call} for call in found]


def check_strings(where: str, value: Any) -> None:
    """Check every string inside lists and mappings.

    Raises:
        RowError: one cannot be tokenised.
    """
    for text in strings_in(value):
        require_text(where, text)
