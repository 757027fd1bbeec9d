"""Render conversations by a chat template, and find each turn's text in the rendering.

The template is code of its author's: it trims, merges, adds default turns. What it writes between the texts is taken
from a rendering of place-holders (the skeleton); the real rendering must then be that with the real texts in it, to the
letter.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from jinja2 import TemplateSyntaxError

from trainer.data.formats.fields import strings_in
from trainer.data.sources.rows import RowError
from trainer.data.templates.safe_tokenizer import RenderedText, SafeTokenizer, Span
from trainer.data.templates.time_limit import TimeLimit, TimeLimitExceeded
from trainer.errors import DataError

Message = dict[str, Any]
# What the template of an assistant's message writes besides its text, so the place of the text alone is too little.
EXTRA_TEXT_KEYS = ("tool_calls", "reasoning_content", "reasoning", "thinking")
MAX_SKELETONS = 1000
MAX_RENDERED = 64 << 20  # characters of one conversation
_TIME_LIMIT = TimeLimit(10.0)  # a rendering takes milliseconds
_LEAVE_OUT = "data.template=FILE.jinja, one that writes tools, or leave `tools` out"


class ChatTemplate:
    """A chat template of one tokenizer.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        source: the template; ``None`` takes the tokenizer's own.
        called: its name in messages.
        hint: what to do where it renders no such conversation.

    Attributes:
        safe_tokenizer: tokenizes its renderings.

    Raises:
        DataError: it is no jinja.
    """

    def __init__(self, tokenizer: Any, source: str | None, called: str, hint: str) -> None:
        self._tokenizer, self._source, self._called, self._hint = tokenizer, source, called, hint
        self._skeletons: dict[tuple[Any, ...], tuple[list[int], list[str]]] = {}
        pair: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
        try:
            _, between = self._skeleton(pair, None, False, "chat template", again=False)
        except RowError:  # it wants other turns; which, the rows may know
            between = []
        added = {t.content for t in tokenizer.added_tokens_decoder.values() if not t.special and t.content.strip()}
        self.safe_tokenizer = SafeTokenizer(tokenizer, [t for t in added if any(t in text for text in between)])
        after = between[-1] if between else ""
        closing = self.safe_tokenizer.control.match(after.lstrip())
        self._ends = {tokenizer.eos_token, closing[0]} if closing else {tokenizer.eos_token}

    def render(
        self,
        messages: list[Message],
        tools: Sequence[Any] | None,
        add_generation_prompt: bool,
        wanted: Collection[int],
        where: str,
    ) -> RenderedText:
        """Render a conversation.

        Args:
            messages: as ``apply_chat_template`` takes them; a message's ``content`` is a string.
            tools: tool definitions.
            add_generation_prompt: open the assistant's turn at the end.
            wanted: the assistant messages whose places are wanted (by index), the last one closed by an end token if
                the template closes it by none.
            where: the row, for messages.

        Raises:
            RowError: ``template`` or ``control_token``: the template refuses, drops or rewrites what the row says, or
                the row's tools hold a control token.
        """
        self._reject_controls(messages, tools, where)
        whole = self._apply(messages, tools, add_generation_prompt, where)
        self._require_named(whole, tools, "a tool", _LEAVE_OUT, where)
        places = self._find_texts(messages, tools, add_generation_prompt, whole, where)
        out = RenderedText(whole, sorted(places.values()))
        for i in sorted(wanted):
            last = i == len(messages) - 1
            if not _is_text_only(messages[i]):
                begin, end, closed = self._find_extra_text(messages, tools, i, whole, where)
            else:
                begin, end = places[i]
                following = bisect_left(out.data, (end, end))
                limit = out.data[following][0] if following < len(out.data) else len(whole)
                stop = self._end_of_turn(whole, end, limit, last)
                end, closed = stop or end, bool(stop)
            if last and not closed:
                out.text = f"{whole[:end]}{self._tokenizer.eos_token}{whole[end:]}"
                end += len(self._tokenizer.eos_token)
            out.answers.append((i, begin, end))
        return out

    def write(self, messages: list[Message], add_generation_prompt: bool = False) -> str | None:
        """Return what the template writes of a conversation; ``None`` where it refuses."""
        try:
            return self._apply(messages, None, add_generation_prompt, "a conversation")
        except RowError:
            return None

    def _end_of_turn(self, text: str, at: int, limit: int, last: bool) -> int:
        """Find the token that closes an answer, and return its end; 0 when there is none. In the middle of a
        conversation the next turn's header may follow at once, which the assistant does not write."""
        gap = text[at:limit]
        found = self.safe_tokenizer.control.match(text, at + len(gap) - len(gap.lstrip()), limit)
        return found.end() if found and (last or found[0] in self._ends) else 0

    def _find_extra_text(
        self, messages: list[Message], tools: Sequence[Any] | None, i: int, whole: str, where: str
    ) -> tuple[int, int, bool]:
        """Find what a message adds to the conversation before it: begin, end, and whether a control token ends it."""
        before = self._apply(messages[:i], tools, True, where) if i else ""
        upto = self._apply(messages[: i + 1], tools, False, where)
        ends = [match.end() for match in self.safe_tokenizer.control.finditer(upto, len(before))]
        closed = bool(ends) and not upto[ends[-1] :].strip()
        end = ends[-1] if closed else len(upto.rstrip())
        if not upto.startswith(before) or not whole.startswith(upto[:end]):
            reason = f"{self._called} writes the turns before or after turn {i + 1} otherwise than it does without them"
            raise self._error(where, f"{reason}, so that turn's place is not known", "data.train_on=last_assistant")
        words = whole[len(before) : end]
        calls = [call.get("function", call) for call in messages[i].get("tool_calls") or ()]
        self._require_named(words, calls, "a tool call", "data.template=FILE.jinja, one that writes tool calls", where)
        for call in calls:
            given = call.get("arguments")
            quoted = json.dumps(given, ensure_ascii=False) if isinstance(given, str) else ""
            if '\\"' in quoted and given not in words:
                reason = f"{self._called} quotes the arguments of {call['name']} twice, as they are a string"
                raise self._error(where, reason, "give arguments as an object, not as a string of JSON")
        thought = next((messages[i][key] for key in EXTRA_TEXT_KEYS[1:] if messages[i].get(key)), "")
        for said in (thought, messages[i]["content"]):
            if str(said).strip() not in words:
                reason = f"{self._called} drops or rewrites what the assistant says or thinks in turn {i + 1}"
                raise self._error(where, reason, "data.template=FILE.jinja, one that writes it")
        return len(before), end, closed

    def _find_texts(
        self, messages: list[Message], tools: Sequence[Any] | None, add_generation_prompt: bool, whole: str, where: str
    ) -> dict[int, Span]:
        """Find the text of each message; a message without text has no place."""
        for again in (False, True):  # a template may write the time of day
            order, between = self._skeleton(messages, tools, add_generation_prompt, where, again)
            found = _match(whole, between, [messages[i] for i in order])
            if found is not None:
                return dict(zip(order, found, strict=True))
        reason = f"{self._called} rewrites what is said in {_roles(messages)}, so the answer's place in it is not known"
        raise self._error(where, reason, "data.template=alpaca, or FILE.jinja: a template that leaves the text alone")

    def _skeleton(
        self, messages: list[Message], tools: Sequence[Any] | None, add_generation_prompt: bool, where: str, again: bool
    ) -> tuple[list[int], list[str]]:
        """Render place-holders: which message's text comes first, second … and what the template writes before, between
        and after them."""
        shape = tuple((m["role"], not m["content"]) for m in messages)
        cached = (
            None
            if any(len(m) > 2 for m in messages)
            else (shape, add_generation_prompt, json.dumps(tools, default=str) if tools else "")
        )
        if cached in self._skeletons and not again:
            return self._skeletons[cached]
        marks = {i: f"\ue000{i}\ue001" for i, m in enumerate(messages) if m["content"] or _is_text_only(m)}
        marked = [{**m, "content": marks.get(i, "")} for i, m in enumerate(messages)]
        text = self._apply(marked, tools, add_generation_prompt, where)
        if tools and text == self._apply(marked, None, add_generation_prompt, where):
            raise self._error(where, f"{self._called} drops the tools", _LEAVE_OUT)
        order = sorted(marks, key=lambda i: text.find(marks[i]))
        spoken = [i for i in order if messages[i]["role"] != "system"]  # some put the system text into a user turn
        moved = spoken != sorted(spoken) or (order and max(marks) != order[-1])
        if moved or any(mark not in text for mark in marks.values()):
            raise self._error(where, f"{self._called} drops a turn of {_roles(messages)}", self._hint)
        between = []
        for i in order:
            before, _, text = text.partition(marks[i])
            between.append(before)
        between.append(text)
        if cached is not None:
            if len(self._skeletons) >= MAX_SKELETONS:
                self._skeletons.clear()
            self._skeletons[cached] = order, between
        return order, between

    def _apply(
        self, messages: list[Message], tools: Sequence[Any] | None, add_generation_prompt: bool, where: str
    ) -> str:
        try:
            with _TIME_LIMIT.limited():
                text = str(
                    self._tokenizer.apply_chat_template(
                        messages,
                        tools=list(tools) if tools else None,
                        chat_template=self._source,
                        tokenize=False,
                        add_generation_prompt=add_generation_prompt,
                    )
                )
            if len(text) > MAX_RENDERED:
                raise ValueError(f"it writes {len(text)} characters")
            return text
        except TimeLimitExceeded as error:
            reason = f"does not end within {_TIME_LIMIT.seconds:.0f} s on {where}"
            raise DataError(self._called, reason=reason, hint="data.template=alpaca, or FILE.jinja") from error
        except TemplateSyntaxError as error:
            raise DataError(
                self._called, reason=f"is no chat template: line {error.lineno}: {error.message}", hint="fix it"
            ) from error
        except Exception as error:  # a template is code of its author's: whatever it raises is about these turns
            message = " ".join(str(error).split())[:200]
            raise self._error(
                where, f"{self._called} refuses the turns {_roles(messages)} ({message})", self._hint
            ) from error

    def _reject_controls(self, messages: list[Message], tools: Sequence[Any] | None, where: str) -> None:
        """Reject control tokens inside tools and tool calls: those strings have no place of their own in the rendering,
        so a control token's text there could not be distinguished from the template's own."""
        extras = ({k: v for k, v in m.items() if k not in ("role", "content")} for m in messages if len(m) > 2)
        for text in chain(strings_in(list(tools or ())), *(strings_in(extra) for extra in extras)):
            if found := self.safe_tokenizer.control.search(text):
                reason = f"holds the control token {found[0]} in its tools or tool calls"
                raise RowError("control_token", where, reason=reason, hint="remove the row, or change that text")

    def _require_named(self, text: str, given: Sequence[Any] | None, what: str, hint: str, where: str) -> None:
        for tool in given or ():
            inner = tool.get("function", tool)
            name = inner.get("name") if isinstance(inner, Mapping) else None
            if isinstance(name, str) and name not in text:
                raise self._error(where, f"{self._called} drops {what} ({name!a})", hint)

    def _error(self, where: str, reason: str, hint: str) -> RowError:
        return RowError("template", where, reason=reason, hint=hint)


def _is_text_only(message: Message) -> bool:
    """Return whether the message is an assistant's that consists of its text alone."""
    return message["role"] == "assistant" and not any(message.get(key) for key in EXTRA_TEXT_KEYS)


def _roles(messages: list[Message]) -> str:
    roles = [m["role"] for m in messages]
    return " → ".join(roles if len(roles) <= 8 else [*roles[:4], "…", *roles[-3:]])


def _match(whole: str, between: list[str], messages: list[Message]) -> list[Span] | None:
    """Find each text from left to right: as it is, or trimmed on either side, as many templates do."""
    if not whole.startswith(between[0]):
        return None
    reached: dict[int, tuple[Any, ...]] = {len(between[0]): ()}  # where we may stand -> the places so far, last first
    for message, after in zip(messages, between[1:], strict=True):
        onward: dict[int, tuple[Any, ...]] = {}
        for begin, path in reached.items():
            for said in _variants(message):
                end = begin + len(said)
                if whole.startswith(said, begin) and whole.startswith(after, end):
                    onward.setdefault(end + len(after), ((begin, end), path))
        reached = onward
    return list(_unwound(reached[len(whole)]))[::-1] if len(whole) in reached else None


def _unwound(path: tuple[Any, ...]) -> Iterator[Span]:
    while path:
        place, path = path
        yield place


def _variants(message: Message) -> list[str]:
    text = message["content"]
    out = [text]
    if text[:1].isspace() or text[-1:].isspace():
        out += [text.strip(), text.rstrip(), text.lstrip()]
    if message["role"] == "tool":  # Llama 3.1's template writes what a tool gives back as a JSON string
        out.append(json.dumps(text, ensure_ascii=False)[1:-1])
    return list(dict.fromkeys(out))
