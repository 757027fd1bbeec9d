"""The layouts that need no chat template: Alpaca's, and texts put together as they are."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.data.formats.turns import Turn
from trainer.data.sources.rows import RowError
from trainer.data.templates.safe_tokenizer import Rendered

ALPACA_PREAMBLE = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
ALPACA_PREAMBLE_NO_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)


def alpaca(turns: Sequence[Turn], preamble: bool, end: str, waits: bool, where: str) -> Rendered:
    """Alpaca's text (Taori et al., 2023). A system text stands before the preamble, a blank line between; earlier
    rounds stand before the last one, a blank line between, each response closed by the end token.

    Args:
        turns: the conversation.
        preamble: whether "Below is an instruction…" is written.
        end: the end token.
        waits: the conversation awaits its answer.
        where: the row, for messages.

    Raises:
        RowError: a turn has no place in it.
    """
    _need_plain(turns, "alpaca", where)
    out = Rendered()
    for i, turn in enumerate(turns):
        if turn.role not in ("system", "user", "assistant") or (turn.role == "system" and i > 0):
            raise _no_place("alpaca", f"a {turn.role} turn there", where)
    if turns and turns[0].role == "system":
        out.say(turns[0].text)
        out.put("\n\n")
        turns, skipped = turns[1:], 1
    else:
        skipped = 0
    if preamble:
        out.put(ALPACA_PREAMBLE if any(turn.input for turn in turns) else ALPACA_PREAMBLE_NO_INPUT)
    for i, turn in enumerate(turns):
        if i:
            out.put("\n\n")
        if turn.role == "assistant":
            out.put("### Response:\n")
            out.answer(i + skipped, turn.text, end)
        else:
            out.put("### Instruction:\n")
            out.say(turn.text)
            if turn.input:
                out.put("\n\n### Input:\n")
                out.say(turn.input)
    if waits:
        out.put("\n\n### Response:\n")
    return out


def plain(turns: Sequence[Turn], end: str, where: str) -> Rendered:
    """The texts as they are, nothing added but the end token after each answer. An answer follows what it answers
    directly; other neighbours have a newline between them, and an input follows its instruction after a blank line.
    A token that holds the end of a prompt and the beginning of its answer counts as the answer's, so a prompt best ends
    where words do: answers that begin with a space, or prompts that end in a newline.

    Raises:
        RowError: a turn has no place in it.
    """
    _need_plain(turns, "plain", where)
    out = Rendered()
    for i, turn in enumerate(turns):
        if turn.role == "assistant":
            out.answer(i, turn.text, end)
            continue
        if i and turns[i - 1].role != "assistant":
            out.put("\n")
        out.say(user_text(turn))
    return out


def user_text(turn: Turn) -> str:
    """What a turn says in one text: an input follows its instruction after a blank line."""
    return f"{turn.text}\n\n{turn.input}" if turn.input else turn.text


def _need_plain(turns: Sequence[Turn], name: str, where: str) -> None:
    if any(turn.extra and turn.extra.get("tool_calls") for turn in turns):
        raise _no_place(name, "tool calls", where)


def _no_place(name: str, what: str, where: str) -> RowError:
    return RowError(
        "template", where, reason=f"data.template={name} has no place for {what}", hint="data.template=chat"
    )
