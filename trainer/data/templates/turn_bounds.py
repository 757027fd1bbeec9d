"""Find what the assistant writes in a skeleton: from the generation prompt on, to the token that ends its turn.

The template is asked once for each role that an answer may follow, not for each turn, so a conversation is rendered a
bounded number of times; each turn found this way is compared with the rendering as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from trainer.data.templates.safe_tokenizer import Answer, Span
from trainer.data.templates.skeleton import MARK_BEGIN, MARK_END, Message, Skeleton

MAX_RENDERED_TURNS = 8  # of one conversation, besides one a role


@dataclass(frozen=True, slots=True)
class TurnBounds:
    """What the assistant writes in one turn, in characters of the skeleton.

    Attributes:
        begin: right after the generation prompt, or after as much of it as stands there.
        end: right after the token that ends the turn; after the last text or call where none does.
        is_asked: exactly what the template writes to ask for this turn stands before ``begin``.
        is_closed: a token ends it.
        dropped: a tool called in it that the template does not write.
    """

    begin: int
    end: int
    is_asked: bool
    is_closed: bool
    dropped: str | None = None


@dataclass(slots=True)
class EndTokens:
    """The texts of control tokens that end a turn of the assistant.

    Attributes:
        control: matches every control token.
        special: those that the tokenizer itself calls special.
        ends: the end token, that of the template's text turns, those of the model's own list.
        of_calls: those that were seen to end a turn with tool calls.
    """

    control: re.Pattern[str]
    special: Collection[str]
    ends: set[str]
    of_calls: set[str] = field(default_factory=set)

    def first_in(self, text: str, at: int, limit: int) -> int:
        """Return where the first of them ends; 0 when there is none."""
        known = self.ends | self.of_calls
        return next((m.end() for m in self.control.finditer(text, at, limit) if m[0] in known), 0)

    def may_end(self, token: str) -> bool:
        """Return whether a control token after a call may end the turn: one like ``</tool_call>`` ends the call."""
        return token in self.ends or (token in self.special and not token.startswith("</"))


class TurnFinder:
    """Finds the bounds of some turns in one skeleton.

    Args:
        skeleton: of the whole conversation.
        marked: the messages that it was rendered from.
        end_tokens: what may end a turn; what is seen is added.
        has_generation_prompt: whether the template opens the assistant's turn when it is asked to.
        render: writes the first so many of those messages, asking for an answer or not; ``None`` where the template
            refuses.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        marked: Sequence[Message],
        end_tokens: EndTokens,
        has_generation_prompt: bool,
        render: Callable[[int, bool], str | None],
    ) -> None:
        self._skeleton, self._marked, self._tokens = skeleton, marked, end_tokens
        self._has_generation_prompt, self._render = has_generation_prompt, render
        self._own: dict[int, tuple[int, int]] = {}  # message -> where its first place-holder begins, its last one ends
        for start, end, piece in zip(skeleton.starts, skeleton.ends, skeleton.pieces, strict=True):
            self._own[piece.message] = self._own.get(piece.message, (start, 0))[0], end
        self._tails: dict[str, str] = {}  # role -> what is written after its text to ask for an answer
        self._openings: dict[str, str] = {}  # role -> what opens its turn after one with calls that no token ends
        self._left = MAX_RENDERED_TURNS

    def find(self, wanted: Collection[int]) -> dict[int, TurnBounds]:
        """Return the bounds of some assistant messages. What asks for the first and the last is rendered for sure."""
        out = {}
        for i in sorted(wanted):
            begin, is_asked = self._find_begin(i, exact=i in (min(wanted), max(wanted)))
            end, is_closed, dropped = self._find_end(i, begin)
            out[i] = TurnBounds(begin, end, is_asked, is_closed, dropped)
        return out

    def _find_begin(self, i: int, exact: bool) -> tuple[int, bool]:
        """Return where a turn begins, and whether exactly its generation prompt stands before."""
        role = self._marked[i - 1]["role"] if i else ""
        tail = self._tails.get(role) if i - 1 in self._own else None
        if tail is not None and not exact:
            begin, is_whole = self._begin_after(i, self._own[i - 1][1], tail)
            if is_whole or not self._may_render():
                return begin, is_whole
        prompt = self._render(i, True)
        text, own = self._skeleton.text, self._own.get(i)
        if prompt is None:
            return (own[0] if own else self._skeleton.ends[-1] if self._skeleton.pieces else 0), False
        cut = prompt.rfind(MARK_END) + 1
        mark = prompt[prompt.rfind(MARK_BEGIN) : cut] if cut else ""
        places = reversed(list(zip(self._skeleton.pieces, self._skeleton.ends, strict=True)))
        at = next((end for piece, end in places if piece.message < i and piece.mark == mark), 0)
        if mark and not at:
            return (own[0] if own else 0), False
        if i - 1 in self._own and self._own[i - 1][1] == at:
            self._tails[role] = prompt[cut:]
        begin, is_whole = self._begin_after(i, at, prompt[cut:])
        return begin, is_whole and text.startswith(prompt)

    def _begin_after(self, i: int, at: int, tail: str) -> tuple[int, bool]:
        """Return where a turn begins that stands after some character and the generation prompt's end, and whether all
        of that stands there."""
        text, own = self._skeleton.text, self._own.get(i)
        limit = own[0] if own else self._skeleton.next_start(at)
        same = _common_length(text[at:limit], tail)
        if same < len(tail):
            tokens = [m.end() - at for m in self._tokens.control.finditer(text, at, limit) if m.end() - at <= same]
            same = max((*tokens, text.rfind("\n", at, at + same) + 1 - at))
            return (at + same if same > 0 else own[0] if own else at), False
        begin = at + same
        if own and not self._has_generation_prompt and text[begin : own[0]].strip():
            return own[0], False  # the header of the turn, which nobody is asked to write
        return begin, True

    def _find_end(self, i: int, begin: int) -> tuple[int, bool, str | None]:
        """Return where a turn ends, whether a token ends it, and the tool whose call is not there."""
        text, is_last = self._skeleton.text, i == len(self._marked) - 1
        at = max(begin, self._own[i][1]) if i in self._own else begin
        calls = self._marked[i].get("tool_calls") or ()
        limit = self._skeleton.next_start(at)
        if not calls and self._marked[i]["content"]:
            gap = text[at:limit]
            found = self._tokens.control.match(text, at + len(gap) - len(gap.lstrip()), limit)
            is_closed = bool(found and (is_last or found[0] in self._tokens.ends))
            return found.end() if found and is_closed else at, is_closed, None
        named, name = begin, ""
        for call in calls:
            name = call.get("function", call)["name"]
            there = text.find(name, named, limit)
            if there < 0:
                return at, False, name
            named = there + len(name)
        after = max(at, named)
        if end := self._tokens.first_in(text, after, limit):
            return end, True, None
        end, is_closed = self._end_alone(i, begin, after, limit)
        return end, is_closed, name if end < after else None

    def _end_alone(self, i: int, begin: int, after: int, limit: int) -> tuple[int, bool]:
        """Find the end of a turn with calls from a rendering that it is the last of."""
        text, role = self._skeleton.text, self._marked[i + 1]["role"] if i + 1 < len(self._marked) else ""
        opening = self._openings.get(role)
        if opening and text.endswith(opening, after, limit):
            return limit - len(opening), False
        upto = (text if not role else self._render(i + 1, False)) if self._may_render() else None
        if upto is None:
            return after, False
        ends = list(self._tokens.control.finditer(upto, begin))
        is_closed = bool(ends) and not upto[ends[-1].end() :].strip() and self._tokens.may_end(ends[-1][0])
        end = ends[-1].end() if is_closed else len(upto.rstrip())
        if not text.startswith(upto[:end]):
            return after, False
        if is_closed:
            self._tokens.of_calls.add(ends[-1][0])
        elif role:
            self._openings[role] = text[end:limit]
        return end, is_closed

    def _may_render(self) -> bool:
        self._left -= 1
        return self._left >= 0


def place_answers(skeleton: Skeleton, spans: list[Span], bounds: dict[int, TurnBounds]) -> list[Answer]:
    """Return where the turns are in the real rendering, whose texts are at ``spans``."""
    said = {p.message: span[0] for p, span in zip(skeleton.pieces, spans, strict=True) if not p.is_thought}
    thinks = {piece.message for piece in skeleton.pieces if piece.is_thought}
    lost = {piece.message for piece in skeleton.lost}
    out = []
    for i, found in sorted(bounds.items()):
        begin, end = skeleton.position_in(spans, found.begin), skeleton.position_in(spans, found.end)
        out.append(Answer(i, begin, end, said.get(i, begin), found.is_asked, found.is_closed, i in lost, i in thinks))
    return out


def _common_length(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
