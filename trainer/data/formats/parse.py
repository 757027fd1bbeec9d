"""Parse rows of each format into examples: Alpaca, chat, prompt and completion, multiple choice, plain text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from trainer.data.formats.conversations import MessageKeys, parse_turns
from trainer.data.formats.fields import RowFields, require_text, wrong_type
from trainer.data.formats.meaning import check_meaning
from trainer.data.formats.tool_calls import parse_tools
from trainer.data.formats.turns import Example, Turn
from trainer.data.sources.rows import Row, RowError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def parse_example(row: Row, format: str, columns: Mapping[str, str]) -> Example:
    """Parse a row of a format.

    Raises:
        RowError: a field is missing, has the wrong type, the row has no answer, or it is more than text or no example
            of what to say.
    """
    fields = RowFields(row, columns)
    check_meaning(fields, format)
    example = _PARSERS[format](fields)
    unused = (*example.unused, *fields.unused())
    return replace(example, unused=unused) if unused else example


def _parse_alpaca(fields: RowFields) -> Example:
    """Parse Alpaca (Taori et al., 2023): ``instruction``, optional ``input``, ``output``; besides ``system`` and
    ``history``, the ``[user, assistant]`` pairs that came before."""
    instruction = fields.text("instruction", empty="empty_prompt")
    output = fields.text("output", empty="empty_answer")
    turns = [*_system_turns(fields), *_history_turns(fields)]
    turns.append(Turn("user", instruction, input=fields.optional_text("input")))
    return _make_example(fields, [*turns, Turn("assistant", output, answer=True)])


def _history_turns(fields: RowFields) -> list[Turn]:
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


def _parse_chat(fields: RowFields) -> Example:
    """Parse ``messages`` (OpenAI), ``conversations`` (ShareGPT) or ``contents`` (Gemini), with ``system`` and ``tools``
    beside them."""
    name, keys = fields.first("messages", "conversations", "contents"), _message_keys(fields)
    turns = [*_system_turns(fields), *parse_turns(fields.where(name), fields.require(name), True, keys)]
    _check_one_system_text(fields.where(name), turns)
    _require_answer(fields.where(name), turns)
    return _with_tools(fields, turns, keys, name)


def _parse_prompt_completion(fields: RowFields) -> Example:
    """Parse ``prompt`` and ``completion`` (or ``response``), each a string, a message or a list of messages; or
    ``user`` and ``assistant``."""
    prompt_name, name = fields.first("prompt", "user"), fields.first("completion", "response", "assistant")
    prompt, completion, keys = fields.require(prompt_name), fields.require(name), _message_keys(fields)
    turns = _system_turns(fields)
    if isinstance(prompt, list):
        turns += parse_turns(fields.where(prompt_name), prompt, False, keys)
    else:
        turns.append(Turn("user", fields.text(prompt_name, empty="empty_prompt")))
    _check_one_system_text(fields.where(prompt_name), turns)
    if isinstance(completion, dict):
        completion = [completion]
    if isinstance(completion, list):
        answers = parse_turns(fields.where(name), completion, True, keys)
        _require_answer(fields.where(name), answers)
    else:
        answers = [Turn("assistant", fields.text(name, empty="empty_answer"), answer=True)]
    return _with_tools(fields, [*turns, *answers], keys, name if isinstance(completion, list) else prompt_name)


def _message_keys(fields: RowFields) -> MessageKeys:
    return MessageKeys({name: fields.columns[name] for name in ("role", "content") if name in fields.columns})


def _check_one_system_text(where: str, turns: list[Turn]) -> None:
    if len([turn for turn in turns[:2] if turn.role == "system"]) == 2:
        reason = "there is a system text and the conversation begins with another"
        raise RowError("bad_turns", where, reason=reason, hint="leave one")


def _with_tools(fields: RowFields, turns: list[Turn], keys: MessageKeys, name: str) -> Example:
    """Make an example of turns, its tools taken from wherever they stand."""
    inner: Any = None
    for i, turn in enumerate(turns):
        if turn.role == "system" and turn.extra and "tools" in turn.extra:
            inner = turn.extra["tools"]
            turns[i] = replace(turn, extra={k: v for k, v in turn.extra.items() if k != "tools"} or None)
    example = _make_example(fields, turns, parse_tools(fields, inner))
    column = fields.columns.get(name, name)
    return replace(example, unused=tuple(f"{column}[].{key}" for key in sorted(keys.unused)))


def _parse_text(fields: RowFields) -> Example:
    """Parse plain text: all of it is in the loss."""
    row = fields.row
    return Example((), row.where, row.line, row.file, text=fields.text("text", empty="empty_answer"))


def _parse_multiple_choice(fields: RowFields) -> Example:
    """Parse a question with options into a prompt: the question, a blank line, the lettered options a line each. The
    letter is the answer."""
    question = fields.text("question", empty="empty_prompt")
    fields.get("subject")  # it groups the scores of some benchmarks, and is no part of the question
    options = _parse_options(fields)
    letter = _correct_letter(fields, options)
    listed = "\n".join(f"{key}. {option}" for key, option in options.items())
    example = _make_example(fields, [Turn("user", f"{question}\n\n{listed}"), Turn("assistant", letter, answer=True)])
    return replace(example, choices="".join(options))


def _parse_options(fields: RowFields) -> dict[str, str]:
    """Parse the options: letter -> text, in the order given."""
    given, where = fields.require("options"), fields.where("options")
    if isinstance(given, dict):
        # Arrow gives every row all keys that any row has, null where it has none.
        pairs = [(str(key).strip().upper(), text) for key, text in given.items() if text is not None]
    elif isinstance(given, list):
        pairs = [(LETTERS[i] if i < len(LETTERS) else "", text) for i, text in enumerate(given)]
    else:
        raise wrong_type(where, given, "a list of strings", 'write ["first", "second"]')
    if not 2 <= len(pairs) <= len(LETTERS):
        reason = "must be 2 to 26"
        raise RowError("bad_options", where, value=f"{len(pairs)} options", reason=reason, hint="fix or remove the row")
    letters = [key for key, _ in pairs]
    if len(set(letters)) < len(letters) or any(len(key) != 1 or key not in LETTERS for key in letters):
        reason = "must be named by letters, each once"
        raise RowError(
            "bad_options", where, value=ascii(letters)[:60], reason=reason, hint='write {"A": "…", "B": "…"}'
        )
    return {key: require_text(f"{where}.{key}", text, empty="bad_options") for key, text in pairs}


def _correct_letter(fields: RowFields, options: dict[str, str]) -> str:
    """Return the letter of the right option: given as a number from 0, as the letter, or as the option's own text."""
    answer, where = fields.require("answer"), fields.where("answer")
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


def _system_turns(fields: RowFields) -> list[Turn]:
    name = fields.first("system", "systemInstruction", "system_instruction")
    value = fields.get(name)
    if name != "system" and isinstance(value, dict):  # Gemini's {"parts": [{"text": …}]}
        (turn,) = parse_turns(fields.where(name), [{"role": "system", **value}], False)
        return [turn] if turn.text.strip() else []
    text = fields.optional_text(name)
    return [Turn("system", text)] if text.strip() else []


def _require_answer(where: str, turns: list[Turn]) -> None:
    if not any(turn.role == "assistant" for turn in turns):
        reason = "has no assistant turn: there is nothing to learn from"
        raise RowError("empty_loss_mask", where, reason=reason, hint="remove the row")


def _make_example(fields: RowFields, turns: list[Turn], tools: tuple[Any, ...] | None = None) -> Example:
    row = fields.row
    return Example(tuple(turns), row.where, row.line, row.file, tools=tools)


_PARSERS: dict[str, Callable[[RowFields], Example]] = {
    "alpaca": _parse_alpaca,
    "chat": _parse_chat,
    "prompt_completion": _parse_prompt_completion,
    "text": _parse_text,
    "multiple_choice": _parse_multiple_choice,
}
