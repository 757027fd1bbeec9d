"""Conversations into token ids with a label mask.

Two properties hold whatever the text says. The mask comes from positions: a token is a label because of where it
stands, never because of its id, so an end token that doubles as padding is still learnt. And text from the data is
never read as control tokens: only control tokens that the template itself wrote are. Where the tokenizer's own reading
of the whole text keeps to that, it is taken as it is; else the stretches between the control tokens are tokenised with
``split_special_tokens``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import accumulate, groupby, product
from typing import Any

from trainer.data.formats import Example
from trainer.errors import DataError

ALPACA_PREAMBLE = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
ALPACA_PREAMBLE_NO_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)


_OFFSETS = {"return_offsets_mapping": True, "verbose": False}


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one example, which of them are learnt, and how many belong to the prompt."""

    ids: list[int]
    labels: list[bool]
    prompt_length: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of rendered text: written by the template or taken from the data, whether it belongs to the answer, and
    whether it is a control token that the template wrote."""

    text: str
    from_data: bool
    answer: bool = False
    control: bool = False


class Template:
    """Renders examples for one tokenizer.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        name: ``data.template``.
        alpaca_role: ``data.alpaca_role``.
        train_on: ``data.train_on``.

    Raises:
        DataError: the tokenizer has no chat template, cannot report offsets, or has no end token.
    """

    def __init__(self, tokenizer: Any, name: str, alpaca_role: str = "user", train_on: str = "completion") -> None:
        if not tokenizer.is_fast:
            raise DataError("tokenizer", rule="reports no character offsets", cure="use a model with a tokenizer.json")
        if name == "chat" and not tokenizer.chat_template:
            raise DataError(
                "data.template", value="chat", rule="this model has no chat template", cure="data.template=alpaca"
            )
        if tokenizer.eos_token is None:
            raise DataError("tokenizer", rule="has no end token, so no answer could ever end", cure="use another model")
        self.tokenizer, self.name, self.alpaca_role, self.train_on = tokenizer, name, alpaca_role, train_on
        self._control = re.compile("|".join(re.escape(t) for t in _special_tokens(tokenizer)))
        self._bos: int | None = tokenizer.bos_token_id if _adds_bos(tokenizer) else None
        self._skeletons: dict[tuple[str, ...], list[str]] = {}

    def encode(self, example: Example) -> Encoded:
        """Token ids and label mask of one example; nothing stands after the last label when the answer is learnt.

        Raises:
            DataError: the chat template changed or dropped the text.
        """
        pieces = self._pieces(example, example.output)
        ids, labels, prompt_length = self._tokenise(pieces)
        if self.train_on == "all":
            labels = [True] * len(ids)
        while not labels[-1]:  # a template's last newline: no label follows it, so it changes no gradient
            ids.pop()
            labels.pop()
        return Encoded(ids, labels, prompt_length)

    def encode_prompt(self, instruction: str, input: str = "") -> list[int]:
        """Token ids of a prompt that awaits its answer, as in training."""
        example = Example(instruction, input, "", where="prompt", line=0)
        ids, _, _ = self._tokenise(self._pieces(example, None))
        return ids

    def end_ids(self) -> list[int]:
        """The token that closes an answer, as this template writes it."""
        ids, labels, _ = self._tokenise(self._pieces(Example("a", "", "a", where="template", line=0), "a"))
        return [token for token, label in zip(ids, labels, strict=True) if label][-1:]

    def describe(self) -> str:
        """What the cached tokens depend on besides the tokenizer's own files."""
        return "\n".join((self.name, self.alpaca_role, self.train_on, str(self.tokenizer.chat_template)))

    def _pieces(self, example: Example, answer: str | None) -> list[Piece]:
        if self.name == "chat":
            return self._chat_pieces(_messages(example, self.alpaca_role), answer, example.where)
        return self._alpaca_pieces(example, answer)

    def _alpaca_pieces(self, example: Example, answer: str | None) -> list[Piece]:
        preamble = ALPACA_PREAMBLE if example.input else ALPACA_PREAMBLE_NO_INPUT
        head = (preamble if self.name == "alpaca" else "") + "### Instruction:\n"
        pieces = [Piece(head, False), Piece(example.instruction, True)]
        if example.input:
            pieces += [Piece("\n\n### Input:\n", False), Piece(example.input, True)]
        pieces.append(Piece("\n\n### Response:\n", False))
        if answer is not None:
            pieces += [Piece(answer, True, answer=True), Piece(self.tokenizer.eos_token, False, answer=True)]
        return pieces

    def _chat_pieces(self, messages: list[dict[str, str]], answer: str | None, where: str) -> list[Piece]:
        """The template's own text between the contents is learnt from a rendering with place-holders in it, then
        checked: put together with the real contents it must give the real rendering, to the letter."""
        if answer is not None:
            messages = [*messages, {"role": "assistant", "content": answer}]
        between = self._skeleton(tuple(m["role"] for m in messages), waits=answer is None)
        rendered = self._render(messages, waits=answer is None)
        for contents in product(*((m["content"], m["content"].strip()) for m in messages)):  # many trim some of them
            if between[0] + "".join(c + b for c, b in zip(contents, between[1:], strict=True)) == rendered:
                break
        else:
            raise DataError(
                where,
                rule="the chat template rewrites the text of its messages, so the answer's place in it is not known",
                cure="data.template=alpaca",
            )
        pieces = [Piece(between[0], False)]
        for message, content, after in zip(messages, contents, between[1:], strict=True):
            is_answer = answer is not None and message is messages[-1]
            pieces.append(Piece(content, True, answer=is_answer))
            end = self._end_of_turn(after) if is_answer else 0
            if is_answer and not end:
                pieces.append(Piece(self.tokenizer.eos_token, False, answer=True))
            if end:
                pieces.append(Piece(after[:end], False, answer=True))
            if after[end:]:
                pieces.append(Piece(after[end:], False))
        return pieces

    def _skeleton(self, roles: tuple[str, ...], waits: bool) -> list[str]:
        cached = self._skeletons.get((*roles, str(waits)))
        if cached is None:
            marks = [f"\ue000{i}\ue001" for i in range(len(roles))]
            text = self._render([{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)], waits)
            cached = []
            for mark in marks:
                before, found, text = text.partition(mark)
                if not found:
                    raise DataError(
                        "chat template", rule=f"drops a turn of {' → '.join(roles)}", cure="data.alpaca_role=user"
                    )
                cached.append(before)
            cached.append(text)
            self._skeletons[(*roles, str(waits))] = cached
        return cached

    def _render(self, messages: list[dict[str, str]], waits: bool) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=waits))
        except Exception as error:  # a template is code of the model's author: whatever it raises is about these turns
            roles = " → ".join(m["role"] for m in messages)
            raise DataError(
                "chat template", rule=f"refuses the turns {roles} ({error})", cure="data.alpaca_role=user"
            ) from error

    def _end_of_turn(self, text: str) -> int:
        """Where the end token that closes an answer ends in the template's text after it; 0 when there is none."""
        stripped = len(text) - len(text.lstrip())
        found = self._control.match(text, stripped)
        return found.end() if found else 0

    def _tokenise(self, pieces: list[Piece]) -> tuple[list[int], list[bool], int]:
        """Token ids, whether each is part of the answer, and the number of tokens before the answer."""
        parts = [p for piece in pieces for p in ([piece] if piece.from_data else self._cut(piece))]
        ids, labels = self._in_one(parts) or self._in_stretches(parts)
        if self.name != "chat" and self._bos is not None:
            ids, labels = [self._bos, *ids], [False, *labels]
        return ids, labels, labels.index(True) if True in labels else len(ids)

    def _in_one(self, parts: list[Piece]) -> tuple[list[int], list[bool]] | None:
        """Ids and labels by the tokenizer's own reading of the whole text, which others will use when they serve the
        model; ``None`` when it would take text from the data for a control token."""
        text = "".join(p.text for p in parts)
        begins = accumulate((len(p.text) for p in parts), initial=0)
        written = [(begin, p) for begin, p in zip(begins, parts, strict=False) if p.control]
        if [m.span() for m in self._control.finditer(text)] != [(at, at + len(p.text)) for at, p in written]:
            return None
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=False, **_OFFSETS)
        characters = [p for p in parts for _ in p.text]
        ids: list[int] = encoded["input_ids"]
        labels: list[bool] = []
        read: list[int] = []
        for token, (begin, end) in zip(ids, encoded["offset_mapping"], strict=True):
            covered = characters[begin:end]
            control = next((p for p in covered if p.control), None)  # such a token may take spaces around it along
            read += [token] if control else []
            labels.append(control.answer if control else any(p.answer for p in covered))
        return (ids, labels) if read == [self._id(p) for _, p in written] else None

    def _in_stretches(self, parts: list[Piece]) -> tuple[list[int], list[bool]]:
        """Ids and labels with the template's control tokens put in by us, and what stands between them tokenised as
        plain text, whatever it says."""
        ids: list[int] = []
        labels: list[bool] = []
        for is_control, group in groupby(parts, key=lambda p: p.control):
            stretch = list(group)
            if is_control:
                ids += [self._id(p) for p in stretch]
                labels += [p.answer for p in stretch]
            elif text := "".join(p.text for p in stretch):
                encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, **_OFFSETS)
                flags = [p.answer for p in stretch for _ in p.text]
                ids += encoded["input_ids"]
                labels += [any(flags[begin:end]) for begin, end in encoded["offset_mapping"]]
        return ids, labels

    def _cut(self, piece: Piece) -> list[Piece]:
        """The template's own text cut at its control tokens."""
        out, at = [], 0
        for match in self._control.finditer(piece.text):
            out += [Piece(piece.text[at : match.start()], False, piece.answer)]
            out += [Piece(match[0], False, piece.answer, control=True)]
            at = match.end()
        return [p for p in (*out, Piece(piece.text[at:], False, piece.answer)) if p.text]

    def _id(self, piece: Piece) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(piece.text))


def _messages(example: Example, alpaca_role: str) -> list[dict[str, str]]:
    if alpaca_role == "system" and example.input:
        return [{"role": "system", "content": example.instruction}, {"role": "user", "content": example.input}]
    text = f"{example.instruction}\n\n{example.input}" if example.input else example.instruction
    return [{"role": "user", "content": text}]


def _special_tokens(tokenizer: Any) -> list[str]:
    added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    return sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)


def _adds_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
