"""Conversations into token ids with a label mask.

Two properties hold whatever the text says. The mask comes from positions: a token is a label because of where it
stands, never because of its id, so an end token that doubles as padding is still learnt. And text from the data is
never read as control tokens (see :mod:`trainer.data.templates.safe_tokenizer`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.formats.turns import Example, Turn, last_assistant
from trainer.data.sources.rows import RowError
from trainer.data.templates.chat_template import ChatTemplate, Message
from trainer.data.templates.plain_templates import alpaca, plain, user_text
from trainer.data.templates.safe_tokenizer import Reader, Rendered
from trainer.errors import DataError

NAMES = ("chat", "alpaca", "alpaca_short", "plain")
SUFFIXES = (".jinja", ".jinja2", ".j2")


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one example and which of them are learnt.

    Attributes:
        ids: token ids.
        labels: whether each is learnt.
        prompt_length: tokens before the text of the last assistant turn: what generation is prompted with. 0 for text.
        opening_length: tokens before the first learnt one (under ``train_on=all``: before the first that
            ``completion`` would learn); all of them for plain text. Rows with equal openings belong together.
    """

    ids: list[int]
    loss_mask: list[bool]
    prompt_length: int
    opening_length: int


class Template:
    """Renders examples for one tokenizer.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        name: ``data.template``: ``chat``, ``alpaca``, ``alpaca_short``, ``plain`` or the path of a chat template.
        alpaca_role: ``data.alpaca_role``; ``system`` puts the instruction of a row that has an input into the system
            turn, after what that says.
        train_on: ``data.train_on``.

    Attributes:
        bos_id: the token that the tokenizer itself puts before a text; ``None`` when it puts none.

    Raises:
        DataError: the tokenizer cannot report offsets or has no end token; the chat template's file cannot be read.
    """

    def __init__(self, tokenizer: Any, name: str, alpaca_role: str = "user", train_on: str = "completion") -> None:
        if not tokenizer.is_fast:
            raise DataError(
                "tokenizer", reason="reports no character offsets", hint="use a model with a tokenizer.json"
            )
        if tokenizer.eos_token is None:
            raise DataError(
                "tokenizer", reason="has no end token, so no answer could ever end", hint="use another model"
            )
        self.tokenizer, self.name, self.alpaca_role, self.train_on = tokenizer, name, alpaca_role, train_on
        self.bos_id: int | None = tokenizer.bos_token_id if _adds_bos(tokenizer) else None
        source = None if name in NAMES else _own(name)
        self._chat: ChatTemplate | None = None
        if source is not None or (name == "chat" and tokenizer.chat_template):
            hint = (
                "data.alpaca_role=user" if alpaca_role == "system" else "data.template=FILE.jinja, one that takes them"
            )
            self._chat = ChatTemplate(tokenizer, source, name if source else "the chat template", hint)
        self._source = source
        self._reader = self._chat.reader if self._chat else Reader(tokenizer)

    @property
    def chat_template(self) -> Any:
        """The chat template in use, for the saved tokenizer to carry; ``None`` when none is."""
        if self._source is not None:
            return self._source
        return self.tokenizer.chat_template if self._chat else None

    def encode(self, example: Example) -> Encoded:
        """Token ids and label mask of one example.

        An answer is learnt with the end token that the template writes after it (the tokenizer's, if it writes none
        after the last turn). Nothing stands after the last label, since it would change no gradient; turns after the
        last answer are left away for the same reason.

        Raises:
            RowError: nothing in it is learnt, or the template cannot render it.
            DataError: ``data.template=chat`` and the model has no chat template.
        """
        if example.text is not None:
            return self._plain_text(example.text, example.where)
        last = last_assistant(example.turns)
        if last is None:
            raise self._nothing(example.where)
        turns = example.turns if self.train_on == "all" else example.turns[: last + 1]
        learnt = _learnt(turns, self.train_on, last)
        if not learnt:
            raise self._nothing(example.where)
        rendered = self._render(turns, example.tools, learnt | {last}, example.where)
        begins = {turn: begin for turn, begin, _ in rendered.answers}
        every = self.train_on == "all"
        reading = self._reader.read(rendered, learnt, example.where)
        ids, loss_mask = reading.ids, [True] * len(reading.ids) if every else reading.loss_mask
        prompt_length, opening_length = reading.start(begins[last]), reading.start(begins[min(learnt)])
        while loss_mask and not loss_mask[-1]:
            ids.pop()
            loss_mask.pop()
        if not loss_mask:
            raise self._nothing(example.where)
        if self._chat is None and self.bos_id is not None:
            ids, loss_mask = [self.bos_id, *ids], [every, *loss_mask]
            prompt_length, opening_length = prompt_length + 1, opening_length + 1
        return Encoded(ids, loss_mask, prompt_length, opening_length)

    def encode_prompt(self, instruction: str, input: str = "") -> list[int]:
        """Token ids of a prompt that awaits its answer, as in training."""
        return self.encode_turns([Turn("user", instruction, input)])

    def encode_turns(self, turns: Sequence[Turn], tools: Sequence[Any] | None = None) -> list[int]:
        """Token ids of a conversation that awaits its answer, as in training.

        Raises:
            RowError: the template cannot render it.
        """
        rendered = self._render(turns, tools, set(), "prompt", waits=True)
        ids = self._reader.read(rendered, (), "prompt").ids
        return [self.bos_id, *ids] if self._chat is None and self.bos_id is not None else ids

    def end_ids(self) -> list[int]:
        """The token that closes an answer, as this template writes it."""
        if self.name == "chat" and self._chat is None:
            return [int(self.tokenizer.eos_token_id)]
        try:
            rendered = self._render([Turn("user", "a"), Turn("assistant", "a")], None, {1}, "template")
        except RowError:  # it takes no such conversation: how the rows' answers end is not known here
            return [int(self.tokenizer.eos_token_id)]
        reading = self._reader.read(rendered, {1}, "template")
        return [token for token, label in zip(reading.ids, reading.loss_mask, strict=True) if label][-1:]

    def describe(self) -> str:
        """What the cached tokens depend on besides the tokenizer's own files."""
        name = self.name if self._source is None else "file"
        return "\n".join((name, self.alpaca_role, self.train_on, str(self.chat_template)))

    def _render(
        self, turns: Sequence[Turn], tools: Sequence[Any] | None, wanted: set[int], where: str, waits: bool = False
    ) -> Rendered:
        if self._chat is not None:
            messages, shift = _messages(turns, self.alpaca_role)
            rendered = self._chat.render(messages, tools, waits, {i + shift for i in wanted}, where)
            rendered.answers = [(i - shift, begin, end) for i, begin, end in rendered.answers]
            return rendered
        if self.name == "chat":
            reason = "this model has no chat template"
            raise DataError("data.template", value="chat", reason=reason, hint="data.template=alpaca")
        if tools:
            reason = f"data.template={self.name} has no place for tools"
            raise RowError("template", where, reason=reason, hint="data.template=chat, or leave `tools` out")
        if self.name == "plain":
            return plain(turns, self.tokenizer.eos_token, where)
        return alpaca(turns, self.name == "alpaca", self.tokenizer.eos_token, waits, where)

    def _plain_text(self, text: str, where: str) -> Encoded:
        rendered = Rendered()
        rendered.answer(0, text, self.tokenizer.eos_token)
        ids = self._reader.read(rendered, {0}, where).ids
        ids = ids if self.bos_id is None else [self.bos_id, *ids]
        return Encoded(ids, [True] * len(ids), 0, len(ids))

    def _nothing(self, where: str) -> RowError:
        reason = f"holds nothing that data.train_on={self.train_on} learns"
        return RowError("empty_loss_mask", where, reason=reason, hint="mend its weights or roles, or remove the row")


def _learnt(turns: Sequence[Turn], train_on: str, last: int) -> set[int]:
    """Which turns are learnt; of ``all``, those that would be if only answers were."""
    mine = {i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.weight}
    answers = {i for i in mine if turns[i].answer}
    if train_on == "all":
        return answers or mine or {last}
    return {"completion": answers, "assistant": mine, "last_assistant": mine & {last}}[train_on]


def _messages(turns: Sequence[Turn], alpaca_role: str) -> tuple[list[Message], int]:
    """What ``apply_chat_template`` takes, and how many messages stand before the first turn's."""
    out: list[Message] = []
    instructions = []
    for turn in turns:
        as_system = alpaca_role == "system" and bool(turn.input)
        instructions += [turn.text] if as_system else []
        text = turn.input if as_system else user_text(turn)
        out.append({"role": turn.role, "content": text, **(turn.extra or {})})
    if not instructions:
        return out, 0
    if out[0]["role"] == "system":
        out[0]["content"] = "\n\n".join([out[0]["content"], *instructions])
        return out, 0
    return [{"role": "system", "content": "\n\n".join(instructions)}, *out], 1


def _own(name: str) -> str:
    """The text of a chat template's file."""
    if not name.endswith(SUFFIXES):
        reason = f"must be one of {', '.join(NAMES)}, or a file ending in {', '.join(SUFFIXES)}"
        raise DataError("data.template", value=name, reason=reason, hint="data.template=chat")
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = f"cannot be read ({error})"
        raise DataError("data.template", value=name, reason=reason, hint="data.template=PATH/TO/FILE.jinja") from error


def _adds_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
