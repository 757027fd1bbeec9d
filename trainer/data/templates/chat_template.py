"""Render conversations by a chat template, and find each turn's text in the rendering.

The template is code of its author's: it trims, merges, adds default turns, changes earlier turns when later ones come.
So what is trained on is its rendering of the whole conversation, whose parts are found by place-holders
(:mod:`trainer.data.templates.skeleton`).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import Any

from trainer.data.formats.fields import strings_in
from trainer.data.sources.rows import RowError
from trainer.data.templates.end_tokens import model_end_tokens
from trainer.data.templates.renderer import Renderer, roles_of
from trainer.data.templates.safe_tokenizer import RenderedText, SafeTokenizer
from trainer.data.templates.skeleton import (
    THOUGHT_KEYS,
    Message,
    Piece,
    Skeleton,
    find_texts,
    make_skeleton,
    mark_texts,
)
from trainer.data.templates.tool_arguments import other_arguments
from trainer.data.templates.turn_bounds import EndTokens, TurnBounds, TurnFinder, place_answers

MAX_SKELETONS = 1000
_LEAVE_OUT = "data.template=FILE.jinja, one that writes tools, or leave `tools` out"
_THINKS = "<think>\n\n\n\ue0001t\ue001\n\n\n</think>\n\n\n\n\ue0001\ue001"


class ChatTemplate:
    """A chat template of one tokenizer.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        source: the template; ``None`` takes the tokenizer's own.
        called: its name in messages.
        hint: what to do where it renders no such conversation.
        template_kwargs: more variables of the template's: ``data.template_kwargs``.

    Attributes:
        safe_tokenizer: tokenizes its renderings.
        end_tokens: what may end a turn of the assistant.

    Raises:
        DataError: it is no jinja.
    """

    def __init__(
        self,
        tokenizer: Any,
        source: str | None,
        called: str,
        hint: str,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer, self._called, self._hint = tokenizer, called, hint
        self._renderer = Renderer(tokenizer, source, called, hint, template_kwargs or {})
        self._found: dict[tuple[Any, ...], tuple[Skeleton, dict[int, TurnBounds]]] = {}
        self._keeps: dict[tuple[Any, ...], bool] = {}
        self._tools: list[Any] | None = None  # the last that were seen to be written
        self._arguments = ""  # how tool calls are to give them, where as they came was refused
        pair: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
        between = self._between(pair)
        special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        added = {t.content for t in tokenizer.added_tokens_decoder.values() if not t.special and t.content.strip()}
        self.safe_tokenizer = SafeTokenizer(tokenizer, [t for t in added if any(t in text for text in between)])
        control = self.safe_tokenizer.control
        ends = {tokenizer.eos_token, *(match[0] for text in between[-1:] if (match := control.match(text.lstrip())))}
        middle = self._between([*pair, pair[0]])
        found = control.match(middle[-2].lstrip()) if middle else None
        if found is None or found[0] not in ends:  # what opens the next turn may be what the model stops at
            ends |= model_end_tokens(tokenizer)
        self.end_tokens = EndTokens(control, special, ends)
        self._has_generation_prompt = self._renderer.render_or_none(pair[:1]) != self._renderer.render_or_none(
            pair[:1], add_generation_prompt=True
        )
        thinks: list[Message] = [pair[0], {"role": "assistant", "content": _THINKS}]
        written = [self._renderer.render_or_none(turns) for turns in (thinks, [*thinks, *pair])]
        self._splits_thoughts = any(text is not None and _THINKS not in text for text in written)

    def _between(self, messages: list[Message]) -> list[str]:
        """Return what is written before, between and after the texts; nothing where it refuses or drops them."""
        marked, pieces = mark_texts(messages, False)
        rendered = self._renderer.render_or_none(marked)
        skeleton = make_skeleton(rendered or "", pieces)
        return [] if skeleton.lost else skeleton.between()

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
        forms = other_arguments(messages, first=self._arguments)
        error: RowError | None = None
        for form, given in forms:
            try:
                rendered = self._render(given, tools, add_generation_prompt, wanted, where)
            except RowError as refused:
                if refused.code != "template":
                    raise
                error = refused
                continue
            if form:
                self._arguments = form
            return rendered
        assert error is not None, "there is always a first form"
        raise error

    def write(self, messages: list[Message], add_generation_prompt: bool = False) -> str | None:
        """Return what the template writes of a conversation; ``None`` where it refuses."""
        return self._renderer.render_or_none(messages, None, add_generation_prompt)

    def _render(
        self,
        messages: list[Message],
        tools: Sequence[Any] | None,
        add_generation_prompt: bool,
        wanted: Collection[int],
        where: str,
    ) -> RenderedText:
        whole = self._renderer.render(messages, tools, add_generation_prompt, where)
        drops_tools = self._drops_tools(messages, tools, whole, where)
        for again in (False, True):  # a template may write the time of day
            skeleton, bounds = self._find(messages, tools, add_generation_prompt, wanted, where, again)
            spans = find_texts(whole, skeleton)
            if spans is not None:
                break
        else:
            reason = f"{self._called} rewrites what is said in {roles_of(messages)}, so the answer's place is not known"
            hint = "data.template=alpaca, or FILE.jinja: a template that leaves the text alone"
            raise self._renderer.error(where, reason, hint)
        self._check_calls(messages, skeleton, bounds, where)
        out = RenderedText(whole, spans, cuts_tokens=True, drops_tools=drops_tools)
        out.answers = place_answers(skeleton, spans, bounds)
        if out.answers and out.answers[-1].turn == len(messages) - 1 and not bounds[len(messages) - 1].is_closed:
            last = out.answers[-1]
            out.text = f"{whole[: last.end]}{self._tokenizer.eos_token}{whole[last.end :]}"
            last.end += len(self._tokenizer.eos_token)
            last.is_closed = True
        return out

    def _find(
        self,
        messages: list[Message],
        tools: Sequence[Any] | None,
        add_generation_prompt: bool,
        wanted: Collection[int],
        where: str,
        again: bool,
    ) -> tuple[Skeleton, dict[int, TurnBounds]]:
        """Render place-holders, and find the bounds of the turns that are wanted in them."""
        marked, pieces = mark_texts(messages, self._splits_thoughts)
        key = None
        if not any(m.get("tool_calls") or m["content"].startswith("<tool_response>") for m in messages):
            is_plain = all(len(message) == 2 for message in marked)  # as most rows are; JSON takes several times longer
            shape: Any = (
                tuple((m["role"], m["content"]) for m in marked) if is_plain else json.dumps(marked, default=str)
            )
            written = json.dumps(tools, default=str) if tools else ""
            key = (shape, written, add_generation_prompt, tuple(sorted(wanted)))
        if key in self._found and not again:
            known, bounds = self._found[key]
            return known.holding(pieces), bounds
        text = self._renderer.render(marked, tools, add_generation_prompt, where)
        for i, message in enumerate(marked):  # what is written as it stands is all the row's
            if message["role"] == "user" and message["content"].startswith("<tool_response>"):
                piece = next(piece for piece in pieces if piece.message == i)
                if message["content"] in text:
                    text = text.replace(message["content"], piece.mark)
                    pieces[pieces.index(piece)] = Piece(i, messages[i]["content"], "user")
        skeleton = make_skeleton(text, pieces)
        self._require_texts(messages, marked, tools, skeleton, wanted, where)

        def render(count: int, ask: bool) -> str | None:
            return self._renderer.render_or_none(marked[:count], tools, ask)

        finder = TurnFinder(skeleton, marked, self.end_tokens, self._has_generation_prompt, render)
        found = skeleton, finder.find(wanted)
        if key is not None:
            if len(self._found) >= MAX_SKELETONS:
                self._found.clear()
            self._found[key] = found
        return found

    def _require_texts(
        self,
        messages: list[Message],
        marked: list[Message],
        tools: Sequence[Any] | None,
        skeleton: Skeleton,
        wanted: Collection[int],
        where: str,
    ) -> None:
        """Require all that is said to be there in its order, and all thoughts that the template ever writes."""
        spoken = [piece.message for piece in skeleton.pieces if piece.role != "system"]  # a user turn may hold that
        moved = spoken != sorted(spoken) or (spoken and max(spoken) != skeleton.pieces[-1].message)
        for piece in skeleton.lost:
            has_calls = bool(messages[piece.message].get("tool_calls"))
            if not piece.is_thought and not has_calls:
                moved = True
            elif piece.message in wanted and not self._keeps_last(marked, tools, piece, has_calls):
                reason = (
                    f"{self._called} drops or rewrites what the assistant says or thinks in turn {piece.message + 1}"
                )
                raise self._renderer.error(
                    where, reason, "data.template=FILE.jinja, one that writes it, or take it out"
                )
        if moved:
            raise self._renderer.error(where, f"{self._called} drops a turn of {roles_of(messages)}", self._hint)

    def _keeps_last(self, marked: list[Message], tools: Sequence[Any] | None, piece: Piece, has_calls: bool) -> bool:
        """Return whether a text that is lost is written as long as its turn is the last, as some templates drop what
        was thought once the conversation goes on."""
        i = piece.message
        if i == len(marked) - 1:
            return False
        key = (has_calls, piece.is_thought, *sorted(marked[i]))
        if key not in self._keeps:
            self._keeps[key] = piece.mark in (self._renderer.render_or_none(marked[: i + 1], tools) or "")
        return self._keeps[key]

    def _check_calls(
        self, messages: list[Message], skeleton: Skeleton, bounds: dict[int, TurnBounds], where: str
    ) -> None:
        """Require the calls of the turns that are wanted to be there, and not quoted twice."""
        for i, found in bounds.items():
            if found.dropped is not None:
                hint = "data.template=FILE.jinja, one that writes tool calls"
                raise self._renderer.error(where, f"{self._called} drops a tool call ({found.dropped!a})", hint)
            words = skeleton.text[found.begin : found.end]
            for call in messages[i].get("tool_calls") or ():
                inner = call.get("function", call)
                given = inner.get("arguments")
                if isinstance(given, str) and given not in words.replace(json.dumps(given, ensure_ascii=False), ""):
                    reason = f"{self._called} quotes the arguments of {inner['name']} twice, as they are a string"
                    raise self._renderer.error(where, reason, "give arguments as an object, not as a string of JSON")

    def _drops_tools(self, messages: list[Message], tools: Sequence[Any] | None, whole: str, where: str) -> bool:
        """Return whether the template writes no tools at all, so that servers ask without them too; one that writes
        some of them raises."""
        if not tools:
            return False
        if self._tools != list(tools):
            opening = [message for message in messages[:2] if message["role"] in ("system", "user")]
            written, without = (
                self._renderer.render_or_none(opening, tools, True),
                self._renderer.render_or_none(opening, None, True),
            )
            if written is None or written == without:
                marked, _ = mark_texts(messages, self._splits_thoughts)
                if self._renderer.render(marked, tools, False, where) == self._renderer.render(
                    marked, None, False, where
                ):
                    return True
            self._tools = list(tools)
        for tool in tools:
            inner = tool.get("function", tool)
            name = inner.get("name") if isinstance(inner, Mapping) else None
            if isinstance(name, str) and name not in whole:
                raise self._renderer.error(where, f"{self._called} drops a tool ({name!a})", _LEAVE_OUT)
        return False

    def _reject_controls(self, messages: list[Message], tools: Sequence[Any] | None, where: str) -> None:
        """Reject control tokens inside tools and tool calls: those strings have no place of their own in the rendering,
        so a control token's text there could not be distinguished from the template's own."""
        placed = ("role", "content", *THOUGHT_KEYS)
        extras = ({k: v for k, v in m.items() if k not in placed} for m in messages if len(m) > 2)
        for text in chain(strings_in(list(tools or ())), *(strings_in(extra) for extra in extras)):
            if found := self.safe_tokenizer.control.search(text):
                reason = f"holds the control token {found[0]} in its tools or tool calls"
                raise RowError("control_token", where, reason=reason, hint="remove the row, or change that text")
