"""Rendered text into token ids, each of which knows its characters.

Text from the data is never read as control tokens: only those that the template itself wrote are. Where the tokenizer's
own reading of the whole text keeps to that, it is taken as it is, since others will use it when they serve the model;
else the stretches between the control tokens are tokenised as plain text.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from trainer.data.sources.rows import RowError

Span = tuple[int, int]


@dataclass(slots=True)
class Rendered:
    """What a template wrote.

    Attributes:
        text: all of it.
        data: the characters that come from the row, as spans in order; the others are the template's own.
        answers: of assistant turns, ``(turn, begin, end)``: the characters of what the model has to write itself, the
            end token included.
    """

    text: str = ""
    data: list[Span] = field(default_factory=list)
    answers: list[tuple[int, int, int]] = field(default_factory=list)

    def put(self, text: str) -> None:
        """Append text of the template's own."""
        self.text += text

    def say(self, text: str) -> None:
        """Append text from the row."""
        self.data.append((len(self.text), len(self.text) + len(text)))
        self.text += text

    def answer(self, turn: int, text: str, end: str) -> None:
        """Append an assistant turn and its end token."""
        begin = len(self.text)
        self.say(text)
        self.put(end)
        self.answers.append((turn, begin, len(self.text)))


@dataclass(frozen=True, slots=True)
class Reading:
    """Token ids, which of them are learnt, and which characters each stands for."""

    ids: list[int]
    loss_mask: list[bool]
    offsets: Sequence[Span]
    reach: list[int]  # how far each token and those before it go
    special: Collection[int]

    def start(self, character: int) -> int:
        """The first token that stands for this character or a later one; a control token that takes the spaces around
        it along does not stand for those."""
        for token in range(bisect_right(self.reach, character), len(self.ids)):
            begin, end = self.offsets[token]
            if end > character and (begin >= character or self.ids[token] not in self.special):
                return token
        return len(self.ids)


class Reader:
    """Reads rendered text with one tokenizer.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        markers: added tokens that the tokenizer does not call special, yet the template writes around its turns.

    Attributes:
        control: matches every control token.
    """

    def __init__(self, tokenizer: Any, markers: Collection[str] = ()) -> None:
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        names = {*special, *markers, *(t for t in (tokenizer.bos_token, tokenizer.eos_token) if t)}
        self.control = re.compile("|".join(re.escape(n) for n in sorted(names, key=len, reverse=True)))
        self._id_of = {name: int(tokenizer.convert_tokens_to_ids(name)) for name in names}
        # The unknown token also stands for what the vocabulary lacks, wherever that comes from.
        self._special = frozenset(self._id_of.values()) - {tokenizer.unk_token_id}
        self._backend = _made_special(tokenizer.backend_tokenizer, markers) if markers else tokenizer.backend_tokenizer

    def read(self, rendered: Rendered, learnt: Collection[int], where: str) -> Reading:
        """Tokenise.

        Args:
            rendered: the text.
            learnt: the turns whose answers are learnt.
            where: the row, for messages.

        Raises:
            RowError: the tokenizer makes a control token of the row's text however it is asked.
        """
        text = rendered.text
        controls = self._controls(rendered)
        ids, offsets = self._in_one(text, controls) or self._in_stretches(text, controls, where)
        # 0 nothing, 1 learnt, 2 and 3 the same of control tokens: those decide for a token that takes spaces along.
        marks = bytearray(len(text))
        for turn, begin, end in rendered.answers:
            if turn in learnt:
                marks[begin:end] = b"\1" * (end - begin)
        for begin, end in controls:
            marks[begin:end] = bytes([marks[begin] | 2]) * (end - begin)
        reach = list(accumulate((end for _, end in offsets), max))
        begins = [begin for turn, begin, _ in rendered.answers if turn in learnt]
        first = bisect_right(reach, min(begins, default=len(text)))
        loss_mask = [False] * first + [max(marks[begin:end], default=0) & 1 > 0 for begin, end in offsets[first:]]
        return Reading(ids, loss_mask, offsets, reach, self._special)

    def _controls(self, rendered: Rendered) -> list[Span]:
        """Where the template's own control tokens stand."""
        out: list[Span] = []
        at = 0
        for begin, end in (*rendered.data, (len(rendered.text), 0)):
            out += [match.span() for match in self.control.finditer(rendered.text, at, begin)]
            at = end
        return out

    def _in_one(self, text: str, controls: list[Span]) -> tuple[list[int], Sequence[Span]] | None:
        """The tokenizer's own reading of the whole text; ``None`` when it takes the row's text for a control token."""
        if [match.span() for match in self.control.finditer(text)] != controls:
            return None
        encoding = self._encode(text, plain=False)
        ids: list[int] = encoding.ids
        written = [self._id_of[text[begin:end]] for begin, end in controls]
        special = self._special
        if [i for i in ids if i in special] != [i for i in written if i in special]:
            return None
        return ids, encoding.offsets

    def _in_stretches(self, text: str, controls: list[Span], where: str) -> tuple[list[int], Sequence[Span]]:
        """The template's control tokens put in by us, what stands between them tokenised as plain text."""
        ids: list[int] = []
        offsets: list[Span] = []
        at = 0
        for begin, end in (*controls, (len(text), len(text))):
            if begin > at:
                encoding = self._encode(text[at:begin], plain=True)
                ids += encoding.ids
                offsets += [(at + b, at + e) for b, e in encoding.offsets]
                if taken := self._special.intersection(encoding.ids):
                    name = next(name for name, i in self._id_of.items() if i in taken)
                    reason = (
                        f"holds the text of the control token {name}, which this tokenizer cannot read as plain text"
                    )
                    raise RowError("control_token", where, reason=reason, hint="remove the row, or change that text")
            if end > begin:
                ids.append(self._id_of[text[begin:end]])
                offsets.append((begin, end))
            at = end
        return ids, offsets

    def _encode(self, text: str, plain: bool) -> Any:
        """The backend's encoding: transformers' wrapper around it costs more than half as much again. The settings are
        the ones that any call of the wrapper leaves behind."""
        backend = self._backend
        if backend.encode_special_tokens != plain:
            backend.encode_special_tokens = plain
        if backend.padding is not None:
            backend.no_padding()
        if backend.truncation is not None:
            backend.no_truncation()
        return backend.encode(text, add_special_tokens=False)


def _made_special(backend: Any, markers: Collection[str]) -> Any:
    """A copy that can be told to pass over these added tokens, as over special ones."""
    from tokenizers import Tokenizer

    tree = json.loads(backend.to_str())
    for token in tree["added_tokens"]:
        token["special"] = token["special"] or token["content"] in markers
    return Tokenizer.from_str(json.dumps(tree))
