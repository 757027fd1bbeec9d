"""Encode conversations into token ids with a loss mask.

Two properties hold whatever the text says. The mask comes from positions: a token is in the loss because of where it
stands, never because of its id, so an end token that doubles as padding is still in it. And text from the data is
never read as control tokens (see :mod:`trainer.data.templates.safe_tokenizer`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.config.schema import DataConfig
from trainer.data.formats.turns import Example, Turn, last_assistant
from trainer.data.sources.rows import RowError
from trainer.data.templates.chat_template import ChatTemplate, Message
from trainer.data.templates.encoded import Encoded
from trainer.data.templates.messages import to_messages, turns_in_loss
from trainer.data.templates.plain_templates import render_alpaca, render_plain
from trainer.data.templates.renderer import Renderer
from trainer.data.templates.safe_tokenizer import Answer, RenderedText, SafeTokenizer, TokenizedText
from trainer.data.templates.tool_place import ToolPlace
from trainer.errors import DataError

NAMES = ("chat", "alpaca", "alpaca_short", "plain")
SUFFIXES = (".jinja", ".jinja2", ".j2")


class Template:
    """Encodes examples for one tokenizer, by a chat template or a plain one.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        name: ``data.template``: ``chat``, ``alpaca``, ``alpaca_short``, ``plain`` or the path of a chat template.
        alpaca_role: ``data.alpaca_role``; ``system`` puts the instruction of a row that has an input into the system
            turn, after what that says.
        train_on: ``data.train_on``.
        template_kwargs: ``data.template_kwargs``, more variables for a chat template.

    Attributes:
        bos_id: the token that the tokenizer itself puts before a text; ``None`` when it puts none.
        adds_bos: whether that token was put before a template from a file, which writes none.
        safe_tokenizer: tokenizes its renderings.

    Raises:
        DataError: the tokenizer cannot report offsets or has no end token; the chat template's file cannot be read.
    """

    def __init__(
        self,
        tokenizer: Any,
        name: str,
        alpaca_role: str = "user",
        train_on: str = "completion",
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
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
        self.template_kwargs = dict(template_kwargs or {})
        source = None if name in NAMES else _read_template(name)
        self.adds_bos = False
        self._chat: ChatTemplate | None = None
        if source is not None or (name == "chat" and tokenizer.chat_template):
            hint = (
                "data.alpaca_role=user" if alpaca_role == "system" else "data.template=FILE.jinja, one that takes them"
            )
            called = name if source else "the chat template"
            self._chat = ChatTemplate(tokenizer, source, called, hint, self.template_kwargs)
            if source is not None and not self.writes_bos():
                source, self.adds_bos = f"{{{{- bos_token }}}}{source}", True
                self._chat = ChatTemplate(tokenizer, source, called, hint, self.template_kwargs)
        self._source = source
        self._tool_place = ToolPlace(tokenizer, source, self.template_kwargs)
        self.safe_tokenizer = self._chat.safe_tokenizer if self._chat else SafeTokenizer(tokenizer)

    @classmethod
    def from_config(cls, tokenizer: Any, data: DataConfig) -> Template:
        """Make the template that a ``data`` section asks for."""
        return cls(tokenizer, data.template, data.alpaca_role, data.train_on, data.template_kwargs)

    @property
    def chat_template(self) -> Any:
        """The chat template in use, for the saved tokenizer to carry; ``None`` when none is."""
        if self._source is not None:
            return self._source
        return self.tokenizer.chat_template if self._chat else None

    def write_chat(self, messages: list[Message], add_generation_prompt: bool = False) -> str | None:
        """Return what the chat template writes, in use or not; ``None`` where there is none or it refuses."""
        if self._chat is not None:
            return self._chat.write(messages, add_generation_prompt)
        if not self.tokenizer.chat_template:
            return None
        renderer = Renderer(self.tokenizer, None, "the chat template", "", self.template_kwargs)
        return renderer.render_or_none(messages, None, add_generation_prompt)

    def writes_bos(self) -> bool:
        """Return whether the chat template writes the token that the tokenizer itself puts before a text; so too where
        there is no such token or template, or it takes no simple conversation."""
        if self._chat is None or self.bos_id is None:
            return True
        text = self._chat.write([{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}])
        return text is None or text.lstrip().startswith(self.tokenizer.bos_token)

    def encode(self, example: Example) -> Encoded:
        """Encode one example.

        An answer is in the loss with the end token that the template writes after it (the tokenizer's, if it writes
        none after the last turn). Nothing stands after the last token in the loss, since it would change no gradient;
        turns after the last answer are left out for the same reason.

        Raises:
            RowError: nothing in it would be in the loss, or the template cannot render it.
            DataError: ``data.template=chat`` and the model has no chat template.
        """
        if example.text is not None:
            return self._encode_text(example.text, example.where)
        last = last_assistant(example.turns)
        if last is None:
            raise self._nothing_in_loss(example.where)
        turns = example.turns if self.train_on == "all" else example.turns[: last + 1]
        in_loss = turns_in_loss(turns, self.train_on, last)
        if not in_loss:
            raise self._nothing_in_loss(example.where)
        rendered = self._render(turns, example.tools, in_loss | {last}, example.where)
        answers = {answer.turn: answer for answer in rendered.answers}
        every = self.train_on == "all"
        tokenized = self.safe_tokenizer.tokenize(rendered, in_loss, example.where)
        ids, loss_mask = list(tokenized.ids), [True] * len(tokenized.ids) if every else tokenized.loss_mask
        prompt_length = tokenized.token_at(answers[last].begin)
        prefix_length = tokenized.token_at(answers[min(in_loss)].begin)
        counted = [answers[turn] for turn in sorted(in_loss)]
        notes = self._notes(rendered, tokenized, counted)
        while loss_mask and not loss_mask[-1]:
            ids.pop()
            loss_mask.pop()
        if not loss_mask:
            raise self._nothing_in_loss(example.where)
        if self._chat is None and self.bos_id is not None:
            ids, loss_mask = [self.bos_id, *ids], [every, *loss_mask]
            prompt_length, prefix_length = prompt_length + 1, prefix_length + 1
        return Encoded(ids, loss_mask, prompt_length, prefix_length, **notes)

    def _notes(self, rendered: RenderedText, tokenized: TokenizedText, counted: Sequence[Answer]) -> dict[str, Any]:
        """Count what the template does not do as one would wish in the turns in the loss."""
        text, begins_alone = rendered.text, self.safe_tokenizer.begins_alone
        asked = [a.is_asked and (self.name == "plain" or begins_alone(text, tokenized, a.begin)) for a in counted]
        return {
            "first_turn": counted[0].turn,
            "asked_otherwise": asked.count(False),
            "unended": sum(not answer.is_closed for answer in counted),
            "lost_thoughts": sum(answer.has_lost_thoughts for answer in counted),
            "has_thoughts": any(answer.has_thoughts for answer in counted),
            "drops_tools": rendered.drops_tools,
        }

    def encode_prompt(self, instruction: str, input: str = "") -> list[int]:
        """Encode a prompt that awaits its answer, as in training."""
        return self.encode_turns([Turn("user", instruction, input)])

    def encode_turns(self, turns: Sequence[Turn], tools: Sequence[Any] | None = None) -> list[int]:
        """Encode a conversation that awaits its answer, as in training.

        Raises:
            RowError: the template cannot render it.
        """
        rendered = self._render(turns, tools, set(), "prompt", add_generation_prompt=True)
        ids = self.safe_tokenizer.tokenize(rendered, (), "prompt").ids
        return [self.bos_id, *ids] if self._chat is None and self.bos_id is not None else ids

    def end_ids(self) -> list[int]:
        """Return the token that closes an answer, as this template writes it."""
        probe = self._probe()
        if probe is None:
            return [int(self.tokenizer.eos_token_id)]
        _, tokenized = probe
        return [token for token, label in zip(tokenized.ids, tokenized.loss_mask, strict=True) if label][-1:]

    def opening_ids(self) -> list[int]:
        """Return what this template writes between its generation prompt and what an answer says, thinking aside: what
        the model has to write first. Empty with most templates."""
        probe = self._probe()
        if probe is None:
            return []
        answer, tokenized = probe
        return tokenized.ids[tokenized.token_at(answer.begin) : tokenized.token_at(answer.text_begin)]

    def ends_turn(self, token: int) -> bool:
        """Return whether this template, as far as it is known, ends turns of the assistant with a token."""
        ends = self._chat.end_tokens.ends | self._chat.end_tokens.of_calls if self._chat else set()
        return self.tokenizer.convert_ids_to_tokens(token) in ends or token in self.end_ids()

    def unread_kwargs(self) -> list[str]:
        """Return the names in ``data.template_kwargs`` that the template does not hold, so cannot read."""
        source = str(self.chat_template or "")
        return [name for name in self.template_kwargs if not re.search(rf"\b{re.escape(name)}\b", source)]

    def _probe(self) -> tuple[Answer, TokenizedText] | None:
        """Render the shortest conversation; ``None`` where the template takes none: how the rows' answers begin and end
        is then not known."""
        if self.name == "chat" and self._chat is None:
            return None
        try:
            rendered = self._render([Turn("user", "a"), Turn("assistant", "a")], None, {1}, "template")
        except RowError:
            return None
        return rendered.answers[0], self.safe_tokenizer.tokenize(rendered, {1}, "template")

    def describe(self) -> str:
        """Describe what prepared tokens depend on besides the tokenizer's own files, for their fingerprint."""
        name = self.name if self._source is None else "file"
        ends = sorted(self._chat.end_tokens.ends) if self._chat else []
        kwargs = json.dumps([self.template_kwargs, ends], sort_keys=True, default=str)
        return "\n".join((name, self.alpaca_role, self.train_on, kwargs, str(self.chat_template)))

    def _render(
        self,
        turns: Sequence[Turn],
        tools: Sequence[Any] | None,
        wanted: set[int],
        where: str,
        add_generation_prompt: bool = False,
    ) -> RenderedText:
        if self._chat is not None:
            messages, shift = to_messages(turns, self.alpaca_role)
            messages, tools, added = self._tool_place.put(messages, tools)
            shift += added
            rendered = self._chat.render(messages, tools, add_generation_prompt, {i + shift for i in wanted}, where)
            for answer in rendered.answers:
                answer.turn -= shift
            return rendered
        if self.name == "chat":
            reason = "this model has no chat template"
            raise DataError("data.template", value="chat", reason=reason, hint="data.template=alpaca")
        if tools:
            reason = f"data.template={self.name} has no place for tools"
            raise RowError("template", where, reason=reason, hint="data.template=chat, or leave `tools` out")
        if self.name == "plain":
            return render_plain(turns, self.tokenizer.eos_token, where)
        preamble = self.name == "alpaca"
        return render_alpaca(turns, preamble, self.tokenizer.eos_token, add_generation_prompt, where)

    def _encode_text(self, text: str, where: str) -> Encoded:
        rendered = RenderedText()
        rendered.add_answer(0, text, self.tokenizer.eos_token)
        ids = self.safe_tokenizer.tokenize(rendered, {0}, where).ids
        ids = ids if self.bos_id is None else [self.bos_id, *ids]
        return Encoded(ids, [True] * len(ids), 0, len(ids))

    def _nothing_in_loss(self, where: str) -> RowError:
        reason = f"holds nothing that data.train_on={self.train_on} puts into the loss"
        return RowError("empty_loss_mask", where, reason=reason, hint="fix its weights or roles, or remove the row")


def _read_template(name: str) -> str:
    """Read a chat template's file."""
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
