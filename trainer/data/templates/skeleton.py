"""Put place-holders where a conversation's texts stand, and find each text again in the real rendering.

What a template writes between the texts is taken from a rendering of place-holders, the skeleton; the real rendering
must then be that with the real texts in it, to the letter.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainer.data.templates.safe_tokenizer import Span

Message = dict[str, Any]
# What an assistant thinks before it speaks, as the templates of different models call it.
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
MARK_BEGIN, MARK_END = "\ue000", "\ue001"
_THOUGHT = re.compile(r"(\s*(?:<think>\s*)?)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)
_TOOL_RESULT = re.compile(r"(<tool_response>)(.*)(</tool_response>)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Piece:
    """One text of a message: what is said, or thought before.

    Attributes:
        message: which message.
        text: as the row has it.
        role: of the message.
        is_thought: it is what the assistant thinks.
        alike: the first message of the user's that is the same: templates compare messages to find the last one.
    """

    message: int
    text: str
    role: str
    is_thought: bool = False
    alike: int | None = None

    @property
    def mark(self) -> str:
        """The place-holder."""
        number = self.message if self.alike is None else self.alike
        return f"{MARK_BEGIN}{number}{'t' if self.is_thought else ''}{MARK_END}"


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A rendering of place-holders.

    Attributes:
        text: all of it.
        pieces: the texts that it has a place for, in their order there.
        starts, ends: where the place-holder of each begins and ends.
        lost: the texts that it drops.
    """

    text: str
    pieces: tuple[Piece, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    lost: tuple[Piece, ...]

    def holding(self, pieces: Sequence[Piece]) -> Skeleton:
        """Return it with the texts of another conversation of the same shape."""
        place = {(piece.message, piece.is_thought): piece for piece in pieces}
        new = [tuple(place[old.message, old.is_thought] for old in old_ones) for old_ones in (self.pieces, self.lost)]
        return replace(self, pieces=new[0], lost=new[1])

    def between(self) -> list[str]:
        """Return what the template writes before, between and after the texts."""
        begins, ends = [0, *self.ends], [*self.starts, len(self.text)]
        return [self.text[begin:end] for begin, end in zip(begins, ends, strict=True)]

    def next_start(self, at: int) -> int:
        """Return where the first place-holder from some character on begins; the end of the text if there is none."""
        place = bisect_left(self.starts, at)
        return self.starts[place] if place < len(self.starts) else len(self.text)

    def position_in(self, spans: Sequence[Span], at: int) -> int:
        """Return which character of the real rendering one outside all place-holders is.

        Args:
            spans: of the texts in the real rendering.
            at: character of the skeleton.
        """
        place = bisect_right(self.ends, at) - 1
        return spans[place][1] + at - self.ends[place] if place >= 0 else at


def mark_texts(messages: Sequence[Message], splits_thoughts: bool) -> tuple[list[Message], list[Piece]]:
    """Replace the texts of messages by place-holders.

    Args:
        messages: as ``apply_chat_template`` takes them.
        splits_thoughts: the template itself separates ``<think>…</think>`` from what is said.
    """
    marked, pieces = [], []
    users: dict[str, int] = {}
    for i, message in enumerate(messages):
        role, content = message["role"], message["content"]
        changed = dict(message)
        for key in THOUGHT_KEYS:
            if str(message.get(key) or "").strip():
                piece = Piece(i, str(message[key]), role, is_thought=True)
                pieces.append(piece)
                changed[key] = piece.mark
        thought = _THOUGHT.fullmatch(content) if splits_thoughts and role == "assistant" else None
        result = _TOOL_RESULT.fullmatch(content) if role == "user" else None
        if thought and content.count("</think>") == 1 and "<think>" not in thought[2] + thought[4]:
            inner = [Piece(i, thought[2], role, is_thought=True), Piece(i, thought[4], role)]
            opened, closed = thought[1], thought[3]
            changed["content"] = "".join(
                (opened, inner[0].mark if inner[0].text else "", closed, inner[1].mark if inner[1].text else "")
            )
            pieces += [piece for piece in inner if piece.text]
        elif result and result[2]:
            piece = Piece(i, result[2], role)
            pieces.append(piece)
            changed["content"] = f"{result[1]}{piece.mark}{result[3]}"
        elif content or role == "tool" or is_text_only(message):
            piece = Piece(i, content, role, alike=users.setdefault(content, i) if role == "user" else None)
            pieces.append(piece)
            changed["content"] = piece.mark
        marked.append(changed)
    return marked, pieces


def make_skeleton(text: str, pieces: Sequence[Piece]) -> Skeleton:
    """Find the place-holders in a rendering of them."""
    found, reached = [], dict[str, int]()
    for place, piece in enumerate(pieces):
        at = text.find(piece.mark, reached.get(piece.mark, 0))
        reached[piece.mark] = at + 1 if at >= 0 else len(text)
        found.append((at, place))
    found.sort()
    there = [(at, pieces[place]) for at, place in found if at >= 0]
    return Skeleton(
        text,
        tuple(piece for _, piece in there),
        tuple(at for at, _ in there),
        tuple(at + len(piece.mark) for at, piece in there),
        tuple(pieces[place] for at, place in found if at < 0),
    )


def find_texts(whole: str, skeleton: Skeleton) -> list[Span] | None:
    """Find each text in the real rendering, from left to right: as it is, or trimmed as many templates do.

    Returns:
        The characters of each piece; ``None`` when the rendering is not the skeleton with the texts in it.
    """
    between = skeleton.between()
    if not whole.startswith(between[0]):
        return None
    reached: dict[int, tuple[Any, ...]] = {len(between[0]): ()}  # where we may stand -> the places so far, last first
    for piece, after in zip(skeleton.pieces, between[1:], strict=True):
        onward: dict[int, tuple[Any, ...]] = {}
        for begin, path in reached.items():
            for said in _variants(piece):
                end = begin + len(said)
                if whole.startswith(said, begin) and whole.startswith(after, end):
                    onward.setdefault(end + len(after), ((begin, end), path))
        reached = onward
    return list(_unwound(reached[len(whole)]))[::-1] if len(whole) in reached else None


def is_text_only(message: Message) -> bool:
    """Return whether the message is an assistant's that consists of its text alone."""
    return message["role"] == "assistant" and not any(message.get(key) for key in ("tool_calls", *THOUGHT_KEYS))


def _unwound(path: tuple[Any, ...]) -> Iterator[Span]:
    while path:
        place, path = path
        yield place


def _variants(piece: Piece) -> list[str]:
    text = piece.text
    out = [text]
    if text[:1].isspace() or text[-1:].isspace():
        for characters in (None, "\n"):  # one that takes line breaks only leaves an indent
            out += [text.strip(characters), text.rstrip(characters), text.lstrip(characters)]
    if piece.role == "tool":  # Llama 3.1's template writes what a tool gives back as a JSON string
        out += [json.dumps(said, ensure_ascii=False)[1:-1] for said in dict.fromkeys(out)]
    return list(dict.fromkeys(out))
