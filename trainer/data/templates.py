"""Conversations into token ids with a label mask.

Two properties hold whatever the text says. The mask comes from positions: a token is a label because of where it
stands, never because of its id, so an end token that doubles as padding is still learnt. And text from the data is never read
as control tokens: only control tokens that the template itself wrote are, the stretches between them are tokenised
with ``split_special_tokens``.
"""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one example; ``labels[i]`` says whether token ``i`` is learnt, ``prompt_length`` how many precede."""

    ids: list[int]
    labels: list[bool]
    prompt_length: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of rendered text: written by the template or taken from the data, and whether it is the answer."""

    text: str
    from_data: bool
    answer: bool = False


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
        self._control = _special_tokens(tokenizer)
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
        return [self.encode(Example("a", "", "a", where="template", line=0)).ids[-1]]

    def describe(self) -> str:
        """What the cached tokens depend on besides the tokenizer's own files."""
        return "\n".join((self.name, self.alpaca_role, self.train_on, str(self.tokenizer.chat_template)))

    def _pieces(self, example: Example, answer: str | None) -> list[Piece]:
        if self.name == "chat":
            return self._chat_pieces(_messages(example, self.alpaca_role), answer, example.where)
        return self._alpaca_pieces(example, answer)

    def _alpaca_pieces(self, example: Example, answer: str | None) -> list[Piece]:
        preamble = ALPACA_PREAMBLE if example.input else ALPACA_PREAMBLE_NO_INPUT
        begin = self.tokenizer.bos_token if _adds_bos(self.tokenizer) else ""
        head = begin + (preamble if self.name == "alpaca" else "") + "### Instruction:\n"
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
        for contents in ([m["content"] for m in messages], [m["content"].strip() for m in messages]):
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
        for token in self._control:
            if text.startswith(token, stripped):
                return stripped + len(token)
        return 0

    def _tokenise(self, pieces: list[Piece]) -> tuple[list[int], list[bool], int]:
        """Token ids, whether each is part of the answer, and the number of tokens before the answer."""
        ids: list[int] = []
        labels: list[bool] = []
        stretch: list[Piece] = []

        def flush() -> None:
            text = "".join(p.text for p in stretch)
            if text:
                encoded = self.tokenizer(
                    text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
                )
                flags = [p.answer for p in stretch for _ in p.text]
                ids.extend(encoded["input_ids"])
                labels.extend(any(flags[begin:end]) for begin, end in encoded["offset_mapping"])
            stretch.clear()

        for piece in pieces:
            for text, control in [(piece.text, False)] if piece.from_data else self._cut(piece.text):
                if control:
                    flush()
                    ids.append(self.tokenizer.convert_tokens_to_ids(text))
                    labels.append(piece.answer)
                else:
                    stretch.append(Piece(text, piece.from_data, piece.answer))
        flush()
        return ids, labels, labels.index(True) if True in labels else len(ids)

    def _cut(self, text: str) -> list[tuple[str, bool]]:
        """The template's own text cut at its control tokens: (stretch, is a control token)."""
        found = [(at, token) for token in self._control if (at := text.find(token)) >= 0]
        if not found:
            return [(text, False)] if text else []
        at, token = min(found, key=lambda f: (f[0], -len(f[1])))
        rest = self._cut(text[at + len(token) :])
        return [*([(text[:at], False)] if at else []), (token, True), *rest]


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
