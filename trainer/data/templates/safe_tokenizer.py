"""Tokenize rendered text so that text from the data is never read as control tokens, and compute the loss mask.

Only what the template itself wrote may become a control token. Where the tokenizer's own encoding of the whole text
keeps to that, it is taken as it is, since others will use it when they serve the model; else the text between the
control tokens is tokenized as plain text. The loss mask follows from the character offsets of the tokens.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from trainer.data.sources.rows import RowError

_TURN_MARKERS = re.compile(r"<\|(?:im_start|im_end|start_header_id|eot_id)\|>|<(?:start|end)_of_turn>")
Span = tuple[int, int]  # characters, from and to
MAX_HEADER = 64  # characters: what opens a turn is short, and the same in every row


@dataclass(slots=True)
class Answer:
    """What the model has to write itself in one turn, in characters of the rendered text.

    Attributes:
        turn: which turn.
        begin, end: from the generation prompt to the end token, which is included.
        text_begin: where what is said begins: the template may write something else first.
        is_asked: exactly what the template writes to ask for this turn stands before it.
        is_closed: an end token ends it.
        has_lost_thoughts: the template leaves out what was thought in it.
        has_thoughts: what was thought is in it.
    """

    turn: int
    begin: int
    end: int
    text_begin: int
    is_asked: bool = True
    is_closed: bool = True
    has_lost_thoughts: bool = False
    has_thoughts: bool = False


@dataclass(slots=True)
class RenderedText:
    """The text that a template wrote, and which characters of it are whose.

    Attributes:
        text: all of it.
        data: the characters that come from the row, as spans in order; the others are the template's own.
        answers: of assistant turns.
        cuts_tokens: each answer begins with a token of its own, as it does behind a prompt that stands alone.
        drops_tools: the template has left out all tools of the row.
    """

    text: str = ""
    data: list[Span] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    cuts_tokens: bool = False
    drops_tools: bool = False

    def add_template(self, text: str) -> None:
        """Append text of the template's own."""
        self.text += text

    def add_data(self, text: str) -> None:
        """Append text from the row."""
        self.data.append((len(self.text), len(self.text) + len(text)))
        self.text += text

    def add_answer(self, turn: int, text: str, end: str) -> None:
        """Append an assistant turn and its end token."""
        begin = len(self.text)
        self.add_data(text)
        self.add_template(end)
        self.answers.append(Answer(turn, begin, len(self.text), begin))


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """The tokens of a rendered text.

    Attributes:
        ids: token ids.
        loss_mask: which of them are in the loss.
        offsets: the characters that each stands for.
        reach: how far each token and those before it go, in characters.
        special: ids of control tokens.
    """

    ids: list[int]
    loss_mask: list[bool]
    offsets: list[Span]
    reach: list[int]
    special: Collection[int]

    def token_at(self, character: int) -> int:
        """Return the first token that stands for this character or a later one; a control token that takes the spaces
        around it along does not stand for those."""
        for token in range(bisect_right(self.reach, character), len(self.ids)):
            begin, end = self.offsets[token]
            if end > character and (begin >= character or self.ids[token] not in self.special):
                return token
        return len(self.ids)


class SafeTokenizer:
    """Tokenizes rendered text with one Hugging Face tokenizer.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        markers: added tokens that the tokenizer does not call special, yet the template writes around its turns.

    Attributes:
        control: matches every control token.
        is_text_genuine: whether control tokens in the row's text count as the template's own.
    """

    def __init__(self, tokenizer: Any, markers: Collection[str] = ()) -> None:
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        names = {*special, *markers, *(t for t in (tokenizer.bos_token, tokenizer.eos_token) if t)}
        self.control = re.compile("|".join(re.escape(n) for n in sorted(names, key=len, reverse=True)))
        self.is_text_genuine = False
        self._headers: dict[str, list[int]] = {}
        self._control_ids = {name: int(tokenizer.convert_tokens_to_ids(name)) for name in names}
        # The unknown token also stands for what the vocabulary lacks, wherever that comes from.
        self._special = frozenset(self._control_ids.values()) - {tokenizer.unk_token_id}
        self._backend = (
            _with_special_tokens(tokenizer.backend_tokenizer, markers) if markers else tokenizer.backend_tokenizer
        )

    def find_in(self, texts: Iterable[str]) -> tuple[set[str], set[str]]:
        """Return the control tokens that texts hold, and the turn markers of other tokenizers."""
        texts = list(texts)
        own = {found[0] for text in texts for found in self.control.finditer(text)}
        return own, {found[0] for text in texts for found in _TURN_MARKERS.finditer(text)} - own

    def tokenize(self, rendered: RenderedText, turns_in_loss: Collection[int], where: str) -> TokenizedText:
        """Tokenize a text, with the answers of some turns in the loss.

        Args:
            rendered: the text.
            turns_in_loss: the turns whose answers are in the loss.
            where: the row, for messages.

        Raises:
            RowError: the tokenizer makes a control token of the row's text however it is asked.
        """
        text = rendered.text
        controls = self._find_controls(rendered)
        ids, offsets = self._encode_whole(text, controls) or self._encode_pieces(text, controls, where)
        for answer in reversed(rendered.answers) if rendered.cuts_tokens else ():
            self._cut(text, ids, offsets, answer.begin)
        # 0 prompt, 1 in the loss, 2 and 3 the same of control tokens: those decide for a token that takes spaces along.
        marks = bytearray(len(text))
        for answer in rendered.answers:
            if answer.turn in turns_in_loss:
                marks[answer.begin : answer.end] = b"\1" * (answer.end - answer.begin)
        for begin, end in controls:
            marks[begin:end] = bytes([marks[begin] | 2]) * (end - begin)
        reach = list(accumulate((end for _, end in offsets), max))
        begins = [answer.begin for answer in rendered.answers if answer.turn in turns_in_loss]
        first = bisect_right(reach, min(begins, default=len(text)))
        loss_mask = [False] * first + [max(marks[begin:end], default=0) & 1 > 0 for begin, end in offsets[first:]]
        return TokenizedText(ids, loss_mask, offsets, reach, self._special)

    def begins_alone(self, text: str, tokenized: TokenizedText, at: int) -> bool:
        """Return whether the tokens before a character are those of the text before it alone: a token may reach over
        it, or what follows may change how spaces before it are cut."""
        token = first = tokenized.token_at(at)
        if token < len(tokenized.ids) and tokenized.offsets[token][0] < at:
            return tokenized.ids[token] in tokenized.special
        while first and tokenized.ids[first - 1] not in tokenized.special:
            first -= 1
        first -= first > 0  # the control token before them
        begin = tokenized.offsets[first][0] if first < token else at
        header = text[begin:at]
        if len(header) > MAX_HEADER:
            return True
        if header not in self._headers:
            self._headers[header] = self._encode(header, plain=False).ids
        return self._headers[header] == tokenized.ids[first:token]

    def _find_controls(self, rendered: RenderedText) -> list[Span]:
        """Find the template's own control tokens."""
        out: list[Span] = []
        at = 0
        data = () if self.is_text_genuine else rendered.data
        for begin, end in (*data, (len(rendered.text), 0)):
            out += [match.span() for match in self.control.finditer(rendered.text, at, begin)]
            at = end
        return out

    def _cut(self, text: str, ids: list[int], offsets: list[Span], at: int) -> None:
        """Encode what a token that reaches over a character stands in again, as two texts that meet there; left as it
        is where the tokenizer would change the text."""
        token = bisect_right(offsets, (at, -1)) - 1
        if token < 0 or not offsets[token][0] < at < offsets[token][1] or ids[token] in self._special:
            return
        first = last = token
        while first and ids[first - 1] not in self._special:
            first -= 1
        while last + 1 < len(ids) and ids[last + 1] not in self._special:
            last += 1
        begin, end = offsets[first][0], offsets[last][1]
        parts = [(begin, self._encode(text[begin:at], plain=True)), (at, self._encode(text[at:end], plain=True))]
        new = [token for _, part in parts for token in part.ids]
        if self._special.isdisjoint(new) and self._backend.decode(new) == self._backend.decode(ids[first : last + 1]):
            ids[first : last + 1] = new
            offsets[first : last + 1] = [(start + b, start + e) for start, part in parts for b, e in part.offsets]

    def _encode_whole(self, text: str, controls: list[Span]) -> tuple[list[int], list[Span]] | None:
        """Encode the whole text at once; ``None`` when the tokenizer takes the row's text for a control token."""
        if [match.span() for match in self.control.finditer(text)] != controls:
            return None
        encoding = self._encode(text, plain=False)
        ids: list[int] = encoding.ids
        written = [self._control_ids[text[begin:end]] for begin, end in controls]
        special = self._special
        if [i for i in ids if i in special] != [i for i in written if i in special]:
            return None
        return ids, encoding.offsets

    def _encode_pieces(self, text: str, controls: list[Span], where: str) -> tuple[list[int], list[Span]]:
        """Encode what stands between the template's control tokens as plain text, and put those in by their ids."""
        ids: list[int] = []
        offsets: list[Span] = []
        at = 0
        for begin, end in (*controls, (len(text), len(text))):
            if begin > at:
                encoding = self._encode(text[at:begin], plain=True)
                ids += encoding.ids
                offsets += [(at + b, at + e) for b, e in encoding.offsets]
                if taken := self._special.intersection(encoding.ids):
                    name = next(name for name, i in self._control_ids.items() if i in taken)
                    reason = (
                        f"holds the text of the control token {name}, which this tokenizer cannot read as plain text"
                    )
                    raise RowError("control_token", where, reason=reason, hint="remove the row, or change that text")
            if end > begin:
                ids.append(self._control_ids[text[begin:end]])
                offsets.append((begin, end))
            at = end
        return ids, offsets

    def _encode(self, text: str, plain: bool) -> Any:
        """Encode by the backend: transformers' wrapper around it costs more than half as much again. The settings are
        the ones that any call of the wrapper leaves behind."""
        backend = self._backend
        if backend.encode_special_tokens != plain:
            backend.encode_special_tokens = plain
        if backend.padding is not None:
            backend.no_padding()
        if backend.truncation is not None:
            backend.no_truncation()
        return backend.encode(text, add_special_tokens=False)


def _with_special_tokens(backend: Any, markers: Collection[str]) -> Any:
    """Copy a tokenizer with these added tokens made special, so that it can pass over them."""
    from tokenizers import Tokenizer

    tree = json.loads(backend.to_str())
    for token in tree["added_tokens"]:
        token["special"] = token["special"] or token["content"] in markers
    return Tokenizer.from_str(json.dumps(tree))
