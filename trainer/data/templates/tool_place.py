"""Find out where a chat template wants the tools: beside the messages, or inside the system message (Phi-4-mini)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.data.templates.skeleton import Message
from trainer.data.templates.time_limit import TimeLimit

_NAME = "tool_of_a_probe"
_PROBE = {"name": _NAME, "description": "a", "parameters": {"type": "object", "properties": {}}}
_TIME_LIMIT = TimeLimit(10.0)


class ToolPlace:
    """Where the chat template of a tokenizer wants the tools.

    Args:
        tokenizer: a Hugging Face tokenizer.
        source: the template; ``None`` takes the tokenizer's own.
        template_kwargs: more variables of the template's.
    """

    def __init__(self, tokenizer: Any, source: str | None, template_kwargs: Mapping[str, Any]) -> None:
        self._tokenizer, self._source, self._kwargs = tokenizer, source, dict(template_kwargs)
        self._in_system: bool | None = None

    def put(
        self, messages: list[Message], tools: Sequence[Any] | None
    ) -> tuple[list[Message], Sequence[Any] | None, int]:
        """Put the tools where the template wants them.

        Returns:
            The messages and the tools to give to the template; and how many messages now stand before the first.
        """
        if not tools:
            return messages, tools, 0
        if self._in_system is None:
            self._in_system = self._wants_them_in_system()
        if not self._in_system:
            return messages, tools, 0
        written = json.dumps(list(tools), ensure_ascii=False)
        if messages and messages[0]["role"] == "system":
            return [{**messages[0], "tools": written}, *messages[1:]], None, 0
        return [{"role": "system", "content": "", "tools": written}, *messages], None, 1

    def _wants_them_in_system(self) -> bool:
        tools = [{"type": "function", "function": _PROBE}]
        system, user = {"role": "system", "content": "a"}, {"role": "user", "content": "a"}
        if any(_NAME in self._render(messages, tools) for messages in ([system, user], [user])):
            return False
        return _NAME in self._render([{**system, "tools": json.dumps(tools)}, user], None)

    def _render(self, messages: list[Message], tools: list[Any] | None) -> str:
        try:
            with _TIME_LIMIT.limited():
                given = {"tools": tools, "chat_template": self._source, "tokenize": False, **self._kwargs}
                return str(self._tokenizer.apply_chat_template(messages, **given))
        except Exception:  # a template is code of its author's; what is wrong with it, the rows will say
            return ""
