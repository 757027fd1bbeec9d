"""Turn the turns of a row into messages for a chat template, and choose those in the loss."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.data.formats.turns import Turn
from trainer.data.templates.plain_templates import user_text
from trainer.data.templates.skeleton import Message


def turns_in_loss(turns: Sequence[Turn], train_on: str, last: int) -> set[int]:
    """Choose the turns in the loss; of ``all``, those that would be if only answers were."""
    assistant = {i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.weight}
    answers = {i for i in assistant if turns[i].answer}
    if train_on == "all":
        return answers or assistant or {last}
    return {"completion": answers, "assistant": assistant, "last_assistant": assistant & {last}}[train_on]


def to_messages(turns: Sequence[Turn], alpaca_role: str) -> tuple[list[Message], int]:
    """Turn turns into what ``apply_chat_template`` takes; and say how many messages stand before the first turn's."""
    out: list[Message] = []
    instructions = []
    for turn in turns:
        as_system = alpaca_role == "system" and bool(turn.input)
        instructions += [turn.text] if as_system else []
        text = turn.input if as_system else user_text(turn)
        out.append({"role": turn.role, "content": text, **(turn.extra or {})})
    if not instructions:
        return out, 0
    if out[0]["role"] == "system":
        out[0]["content"] = "\n\n".join([out[0]["content"], *instructions])
        return out, 0
    return [{"role": "system", "content": "\n\n".join(instructions)}, *out], 1
