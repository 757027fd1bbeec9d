"""An example as turns of a conversation or plain text, whatever format its row had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation.

    Attributes:
        role: ``system``, ``user``, ``assistant`` or ``tool``.
        text: what is said.
        input: of an Alpaca user turn, what the instruction in ``text`` is about; else empty.
        answer: the row's format calls this turn its answer: Alpaca's output, a completion, a chat's assistant turns.
        weight: 0 leaves an assistant turn out of the loss, 1 does not.
        extra: more keys that a chat template may use: ``tool_calls``, ``name``, ``tool_call_id``, as they came.
    """

    role: str
    text: str
    input: str = ""
    answer: bool = False
    weight: int = 1
    extra: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """One training example.

    Attributes:
        turns: of a conversation, the last assistant turn being the answer that is scored. Empty in plain text.
        where, line, file: of its row.
        text: plain text, all of it in the loss; ``None`` in conversations.
        tools: tool definitions for the chat template, as they came.
        choices: letters of the options, of which the answer is one; empty where it is no multiple choice.
        unused: fields of the row that hold something and are not read, ``messages[].KEY`` for those of messages.
    """

    turns: tuple[Turn, ...]
    where: str
    line: int
    file: int = 0
    text: str | None = None
    tools: tuple[Any, ...] | None = None
    choices: str = ""
    unused: tuple[str, ...] = ()

    @property
    def answer(self) -> str:
        """Text of the last assistant turn (see :func:`last_assistant`); empty in plain text."""
        last = last_assistant(self.turns)
        return "" if last is None else self.turns[last].text


def last_assistant(turns: Sequence[Turn]) -> int | None:
    """Find the assistant turn that is scored: the last one, or, where others have weight 0, the last of weight 1.
    Returns its index, ``None`` without any."""
    assistant = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    return next((i for i in reversed(assistant) if turns[i].weight), assistant[-1] if assistant else None)
