"""Tell which columns and which keys of messages nobody reads, and what to do where they were meant to be."""

from __future__ import annotations

from collections.abc import Mapping

from trainer.config.messages import as_typed, nearest
from trainer.data.prepare.finding import Finding, count_rows

MAX_NAMED = 20
# What others call the fields that a row need not have; asked for only when a row has no such field of its own.
OPTIONAL = {
    "alpaca": ("input", "system", "history"),
    "prompt_completion": ("system", "tools"),
    "chat": ("system", "tools"),
}
ALIASES = {
    "input": ("inputs", "context", "passage"),
    "system": ("system_prompt", "sys", "system_message"),
    "history": ("chat_history", "turns"),
    "tools": ("tool_list", "available_tools"),
}
_OF_LOSS = ("loss", "train", "weight", "weights", "mask")
_ANSWERS = ("label", "labels", "output", "answer", "completion", "response", "summary", "target", "category")


def check_unused(unused: Mapping[str, int], format: str, columns: Mapping[str, str]) -> list[Finding]:
    """Report the fields that nobody reads, in one finding; a warning where one of them is likely to matter.

    Args:
        unused: field -> rows that hold something in it.
        format: of the rows.
        columns: ``data.columns``.
    """
    if not unused:
        return []
    ranked = sorted(unused.items(), key=lambda item: (-item[1], item[0]))
    named = [f"{name} ({count_rows(rows) if i == 0 else f'{rows:,}'})" for i, (name, rows) in enumerate(ranked)]
    more = f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
    hints = list(dict.fromkeys(filter(None, (_hint(name, format, columns) for name, _ in ranked))))
    message = f"not used: {', '.join(named[:MAX_NAMED])}{more}" + (f" → {'; '.join(hints)}" if hints else "")
    return [Finding("not_used", "warning" if hints else "note", ranked[0][1], message, ())]


def _hint(name: str, format: str, columns: Mapping[str, str]) -> str:
    lower = name.lower()
    if lower.startswith("rejected") or lower.endswith("rejected"):
        return f"{name} looks like preference data, of which only the good answers are trained on"
    if lower in _OF_LOSS:
        return f'what is in the loss is said in a message: {{"role": "assistant", "content": "…", "{lower}": …}}'
    if format == "text" and lower in _ANSWERS:
        typed = as_typed("data.columns", {"instruction": "text", "output": name})
        return f"only the text is trained on; to predict {name} from it: {typed}"
    if format == "prompt_completion" and lower in ("input", *ALIASES["input"]):
        mapping = {"instruction": "prompt", "output": "completion", "input": name}
        return f"did you mean {as_typed('data.columns', mapping)}"
    return _near_optional(name, OPTIONAL.get(format, ()), columns)


def _near_optional(name: str, optional: tuple[str, ...], columns: Mapping[str, str]) -> str:
    for ours in optional:
        meant = name.lower() in (ours, *ALIASES[ours]) or nearest(name, [ours], cutoff=0.85) is not None
        if meant and ours not in columns:
            return f"did you mean {ours}? {as_typed('data.columns', {ours: name})}"
    return ""
