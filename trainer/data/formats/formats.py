"""Rows into conversations: the shapes in which people keep their data, told apart by their fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from trainer.config.messages import nearest
from trainer.data.formats.conversations import parse_tools, parse_turns
from trainer.data.formats.fields import Fields, require_text, wrong_type
from trainer.data.formats.turns import Example, Turn
from trainer.data.sources.rows import Row, RowError
from trainer.errors import DataError

__all__ = ["Example", "Turn", "parse_example", "recognise"]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# The fields that a row of a format must have, in the order in which formats are tried: rows of one often carry a field
# of a later one along (Alpaca's own file has `text`, UltraChat has `prompt` beside `messages`).
NEEDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "chat": (("messages",), ("conversations",)),
    "prompt_completion": (("prompt", "completion"), ("prompt", "response")),
    "alpaca": (("instruction", "output"),),
    "multiple_choice": (("question", "options", "answer"),),
    "text": (("text",),),
}
OPTIONAL = ("input", "system", "history", "tools")
# What others call these fields.
ALIASES = {
    "messages": ("conversation", "dialog", "dialogue", "chat", "turns"),
    "prompt": ("query", "question", "source"),
    "completion": ("answer", "output", "target", "reply"),
    "instruction": ("question", "query", "prompt", "task", "sentence"),
    "output": ("response", "answer", "completion", "target", "label", "reply"),
    "question": ("query", "prompt"),
    "options": ("choices", "candidates"),
    "answer": ("label", "answer_idx", "correct", "gold", "target"),
    "text": ("content", "document", "body", "article"),
}


def recognise(row: Row, format: str, columns: Mapping[str, str]) -> str:
    """The format of a row's fields: one of ``parts.FORMATS`` but ``auto``.

    Args:
        row: the first usable row of a part.
        format: anything but ``auto`` is returned as it is.
        columns: our field names -> the row's.

    Raises:
        DataError: ``auto``, and the fields fit no known format; says which fields each format needs. Or a key of
            ``columns`` is no field of any format.
    """
    known = {name for needs in NEEDS.values() for names in needs for name in names} | set(OPTIONAL)
    for key, column in columns.items():
        if key not in known:
            near = nearest(key, known)
            hint = (
                f"did you mean {near}"
                if near
                else f"columns maps our names to yours: one of {', '.join(sorted(known))}"
            )
            raise DataError(f"data.columns.{key}", value=column, reason="is no field of any format", hint=hint)
    if format != "auto":
        return format
    fields = Fields(row, columns)
    for name, needs in NEEDS.items():
        if any(all(map(fields.has, names)) for names in needs):
            return name
    raise DataError(
        row.where,
        value=f"fields {', '.join(sorted(row.fields)) or 'none'}",
        reason="fit no known format: "
        + "; ".join(f"{name} needs {' or '.join(', '.join(n) for n in needs)}" for name, needs in NEEDS.items()),
        hint=f"name your columns: data.columns={{{_suggested(row, columns)}}}",
    )


def parse_example(row: Row, format: str, columns: Mapping[str, str]) -> Example:
    """Read a row in a format.

    Raises:
        RowError: a field is missing, has the wrong type, or there is nothing to learn.
    """
    return _READERS[format](Fields(row, columns))


def _alpaca(fields: Fields) -> Example:
    """Alpaca (Taori et al., 2023): ``instruction``, optional ``input``, ``output``; besides ``system`` and ``history``,
    the ``[user, assistant]`` pairs that came before."""
    instruction = fields.text("instruction", empty="empty_prompt")
    output = fields.text("output", empty="empty_answer")
    turns = [*_system(fields), *_history(fields)]
    turns.append(Turn("user", instruction, input=fields.text_if_any("input")))
    return _example(fields, [*turns, Turn("assistant", output, answer=True)])


def _history(fields: Fields) -> list[Turn]:
    rounds, where = fields.get("history"), fields.where("history")
    if not rounds:
        return []
    if not isinstance(rounds, list):
        raise wrong_type(where, rounds, "a list of [user, assistant] pairs", 'write [["…", "…"]]')
    turns = []
    for i, pair in enumerate(rounds):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise wrong_type(f"{where}[{i}]", pair, "a [user, assistant] pair", 'write ["…", "…"]')
        turns.append(Turn("user", require_text(f"{where}[{i}][0]", pair[0], empty="empty_prompt")))
        turns.append(Turn("assistant", require_text(f"{where}[{i}][1]", pair[1], empty="empty_answer")))
    return turns


def _chat(fields: Fields) -> Example:
    """``messages`` (OpenAI) or ``conversations`` (ShareGPT), with ``system`` and ``tools`` beside them."""
    name = "conversations" if fields.has("conversations") and not fields.has("messages") else "messages"
    turns = [*_system(fields), *parse_turns(fields.where(name), fields.need(name), answers=True)]
    if len([turn for turn in turns[:2] if turn.role == "system"]) == 2:
        reason = "there is a system text and the conversation opens with another"
        raise RowError("bad_turns", fields.where(name), reason=reason, hint="leave one")
    _need_answer(fields.where(name), turns)
    return _example(fields, turns, parse_tools(fields.where("tools"), fields.get("tools")))


def _prompt_completion(fields: Fields) -> Example:
    """``prompt`` and ``completion`` (or ``response``), each a string or a list of messages."""
    name = "response" if fields.has("response") and not fields.has("completion") else "completion"
    prompt, completion = fields.need("prompt"), fields.need(name)
    if isinstance(prompt, list):
        turns = parse_turns(fields.where("prompt"), prompt, answers=False)
    else:
        turns = [Turn("user", fields.text("prompt", empty="empty_prompt"))]
    if isinstance(completion, list):
        answers = parse_turns(fields.where(name), completion, answers=True)
        _need_answer(fields.where(name), answers)
    else:
        answers = [Turn("assistant", fields.text(name, empty="empty_answer"), answer=True)]
    return _example(fields, [*turns, *answers], parse_tools(fields.where("tools"), fields.get("tools")))


def _text(fields: Fields) -> Example:
    row = fields.row
    return Example((), row.where, row.line, row.file, text=fields.text("text", empty="empty_answer"))


def _multiple_choice(fields: Fields) -> Example:
    """A question, a blank line, the options a line each behind their letters; the letter is the answer."""
    question = fields.text("question", empty="empty_prompt")
    options = _options(fields)
    letter = _letter(fields, options)
    listed = "\n".join(f"{key}. {option}" for key, option in options.items())
    example = _example(fields, [Turn("user", f"{question}\n\n{listed}"), Turn("assistant", letter, answer=True)])
    return replace(example, choices="".join(options))


def _options(fields: Fields) -> dict[str, str]:
    """Letter -> text, in the order given."""
    given, where = fields.need("options"), fields.where("options")
    if isinstance(given, dict):
        # Arrow gives every row all keys that any row has, null where it has none.
        pairs = [(str(key).strip().upper(), text) for key, text in given.items() if text is not None]
    elif isinstance(given, list):
        pairs = [(LETTERS[i] if i < len(LETTERS) else "", text) for i, text in enumerate(given)]
    else:
        raise wrong_type(where, given, "a list of strings", 'write ["first", "second"]')
    if not 2 <= len(pairs) <= len(LETTERS):
        reason = "must be 2 to 26"
        raise RowError(
            "bad_options", where, value=f"{len(pairs)} options", reason=reason, hint="mend or remove the row"
        )
    letters = [key for key, _ in pairs]
    if len(set(letters)) < len(letters) or any(len(key) != 1 or key not in LETTERS for key in letters):
        reason = "must be named by letters, each once"
        raise RowError(
            "bad_options", where, value=ascii(letters)[:60], reason=reason, hint='write {"A": "…", "B": "…"}'
        )
    return {key: require_text(f"{where}.{key}", text, empty="bad_options") for key, text in pairs}


def _letter(fields: Fields, options: dict[str, str]) -> str:
    """The letter of the right option: given as a number from 0, as the letter, or as the option's own text."""
    answer, where = fields.need("answer"), fields.where("answer")
    if answer is None:
        raise wrong_type(where, answer, "an option", "")
    found: set[str] = set()
    if isinstance(answer, int) and not isinstance(answer, bool):
        found = {list(options)[answer]} if 0 <= answer < len(options) else set()
    elif isinstance(answer, str):
        found = {key for key, text in options.items() if text == answer or key == answer.strip().upper()}
    if len(found) != 1:
        reason = "names more than one option" if found else f"is none of the {len(options)} options"
        hint = f"give its number from 0, its letter (A to {list(options)[-1]}) or its text"
        raise RowError("bad_options", where, value=ascii(answer)[:60], reason=reason, hint=hint)
    return found.pop()


def _system(fields: Fields) -> list[Turn]:
    text = fields.text_if_any("system")
    return [Turn("system", text)] if text.strip() else []


def _need_answer(where: str, turns: list[Turn]) -> None:
    if not any(turn.role == "assistant" for turn in turns):
        reason = "has no assistant turn: there is nothing to learn from"
        raise RowError("empty_loss_mask", where, reason=reason, hint="remove the row")


def _example(fields: Fields, turns: list[Turn], tools: tuple[Any, ...] | None = None) -> Example:
    row = fields.row
    return Example(tuple(turns), row.where, row.line, row.file, tools=tools)


def _suggested(row: Row, columns: Mapping[str, str]) -> str:
    """``ours: theirs`` for the format that the fields come nearest to."""
    best, most = "instruction: YOURS, output: YOURS", 0
    for needs in NEEDS.values():
        for names in needs:
            found = {name: _their_name(name, row, columns) for name in names}
            score = sum(theirs is not None for theirs in found.values())
            if score == len(names) and score > most and len(set(found.values())) == score:
                best, most = ", ".join(f"{ours}: {theirs}" for ours, theirs in found.items() if ours != theirs), score
    return best


def _their_name(name: str, row: Row, columns: Mapping[str, str]) -> str | None:
    ours = columns.get(name, name)
    likely = (ours, *ALIASES.get(name, ()))
    by_lower = {field.lower(): field for field in row.fields}
    return next((by_lower[n.lower()] for n in likely if n.lower() in by_lower), nearest(ours, row.fields, cutoff=0.75))


_READERS: dict[str, Callable[[Fields], Example]] = {
    "alpaca": _alpaca,
    "chat": _chat,
    "prompt_completion": _prompt_completion,
    "text": _text,
    "multiple_choice": _multiple_choice,
}
