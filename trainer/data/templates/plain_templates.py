"""Render conversations without a chat template: in Alpaca's text, or as plain texts one after the other."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.data.formats.turns import Turn
from trainer.data.sources.rows import RowError
from trainer.data.templates.safe_tokenizer import RenderedText

ALPACA_PREAMBLE = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
ALPACA_PREAMBLE_NO_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)


def render_alpaca(
    turns: Sequence[Turn], preamble: bool, end: str, add_generation_prompt: bool, where: str
) -> RenderedText:
    """Render Alpaca's text (Taori et al., 2023). A system text stands before the preamble, a blank line between;
    earlier rounds stand before the last one, a blank line between, each response closed by the end token.

    Args:
        turns: the conversation.
        preamble: whether "Below is an instruction…" is written.
        end: the end token.
        add_generation_prompt: the conversation awaits its answer.
        where: the row, for messages.

    Raises:
        RowError: a turn has no place in it.
    """
    _require_plain(turns, "alpaca", where)
    out = RenderedText()
    for i, turn in enumerate(turns):
        if turn.role not in ("system", "user", "assistant") or (turn.role == "system" and i > 0):
            raise _no_place("alpaca", f"a {turn.role} turn there", where)
    if turns and turns[0].role == "system":
        out.add_data(turns[0].text)
        out.add_template("\n\n")
        turns, skipped = turns[1:], 1
    else:
        skipped = 0
    if preamble:
        out.add_template(ALPACA_PREAMBLE if any(turn.input for turn in turns) else ALPACA_PREAMBLE_NO_INPUT)
    for i, turn in enumerate(turns):
        if i:
            out.add_template("\n\n")
        if turn.role == "assistant":
            out.add_template("### Response:\n")
            out.add_answer(i + skipped, turn.text, end)
        else:
            out.add_template("### Instruction:\n")
            out.add_data(turn.text)
            if turn.input:
                out.add_template("\n\n### Input:\n")
                out.add_data(turn.input)
    if add_generation_prompt:
        out.add_template("\n\n### Response:\n")
    return out


def render_plain(turns: Sequence[Turn], end: str, where: str) -> RenderedText:
    """Render the texts as they are, nothing added but the end token after each answer. An answer follows its prompt
    directly; other neighbours have a newline between them, and an input follows its instruction after a blank line.
    A token that holds the end of a prompt and the start of its answer counts as the answer's, so a prompt best ends
    where words do: answers that begin with a space, or prompts that end in a newline.

    Raises:
        RowError: a turn has no place in it.
    """
    _require_plain(turns, "plain", where)
    out = RenderedText()
    for i, turn in enumerate(turns):
        if turn.role == "assistant":
            out.add_answer(i, turn.text, end)
            continue
        if i and turns[i - 1].role != "assistant":
            out.add_template("\n")
        out.add_data(user_text(turn))
    return out


def user_text(turn: Turn) -> str:
    """Return the text of a turn: an input follows its instruction after a blank line."""
    return f"{turn.text}\n\n{turn.input}" if turn.input else turn.text


def _require_plain(turns: Sequence[Turn], name: str, where: str) -> None:
    if any(turn.extra and turn.extra.get("tool_calls") for turn in turns):
        raise _no_place(name, "tool calls", where)


def _no_place(name: str, what: str, where: str) -> RowError:
    return RowError(
        "template", where, reason=f"data.template={name} has no place for {what}", hint="data.template=chat"
    )
