"""Check what a chat template makes of the turns of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from trainer.data.prepare.encode import ASKED_OTHERWISE, NO_TOOLS, THINKS
from trainer.data.prepare.finding import Finding, finding


def check_turns(stats: np.ndarray, row_name: Callable[[int], str]) -> list[Finding]:
    """Check what the chat template makes of the turns: whether servers ask as was trained, where turns end, thoughts.

    In multiple turns one row may have one kind of trouble several times, so turns are counted too.
    """
    unended, lost = (int(stats[name].sum()) for name in ("unended", "lost_thoughts"))
    thinks = (stats["flags"] & THINKS) > 0
    silent = ~thinks if thinks.any() else np.zeros(len(stats), dtype=bool)
    asked = (stats["flags"] & ASKED_OTHERWISE) > 0
    otherwise = "answers do not begin where the template's generation prompt ends, so servers ask otherwise,"
    ask_alike = (
        "'data.template_kwargs={enable_thinking: false}' if the template reads it, data.train_on=last_assistant for "
        "earlier turns, or ask with what stands before the answers in `afina data`"
    )
    ends = "answers without an end token of their own (the next turn follows), after which the model does not stop,"
    stop = "data.train_on=last_assistant, or another chat template"
    drops = "thoughts of earlier turns, which the chat template drops, so those turns are trained without, stand"
    keep = "data.train_on=last_assistant, or a row a turn, to learn them"
    no_thought = "some rows have thoughts, and to answer without is taught"
    alike = "bring thoughts for all, or none, if the model is not to do both"
    untold = "the chat template writes no tools, so calls are trained on, and servers ask, without them"
    told = "data.template=FILE.jinja, one that writes tools"
    return [
        *finding("asked_otherwise", "warning", asked, otherwise, ask_alike, row_name),
        *finding("unended_turn", "warning", stats["unended"] > 0, f"{unended:,} {ends}", stop, row_name),
        *finding("lost_thoughts", "warning", stats["lost_thoughts"] > 0, f"{lost:,} {drops}", keep, row_name),
        *finding("no_tools", "warning", (stats["flags"] & NO_TOOLS) > 0, untold, told, row_name),
        *finding("no_thoughts", "note", silent, no_thought, alike, row_name),
    ]


def check_template_kwargs(unread: Sequence[str]) -> list[Finding]:
    """Warn of names in ``data.template_kwargs`` that the template does not read."""
    if not unread:
        return []
    message = f"data.template_kwargs: the template reads no {', '.join(unread)} → take it out, or see its own names"
    return [Finding("template_kwargs", "warning", len(unread), message, ())]
