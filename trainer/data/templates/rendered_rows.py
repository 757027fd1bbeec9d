"""Encode rows that are rendered already (``data.control_tokens=parse``).

Their control tokens are genuine, and the turns in their text say which of it are answers. What opens an answer, and
what ends it, is taken from the chat template; where there is none, it is ChatML's, if the tokenizer has its tokens.
"""

from __future__ import annotations

import re
from dataclasses import replace

from trainer.data.formats.turns import Example
from trainer.data.templates.encoded import Encoded
from trainer.data.templates.plain_templates import user_text
from trainer.data.templates.safe_tokenizer import Answer, RenderedText
from trainer.data.templates.template import Template

CHATML = ("<|im_start|>assistant\n", "<|im_end|>")
_THOUGHT = re.compile(r"<think>.*", re.DOTALL)


class RenderedRows:
    """Encodes rows whose text some template has written.

    Args:
        template: writes the turns of all other rows; from here on it takes control tokens in a row's text for genuine.

    Attributes:
        ends: texts of the tokens that end an answer, that of a turn first.
    """

    def __init__(self, template: Template) -> None:
        self._template = template
        template.safe_tokenizer.is_text_genuine = True
        self._control = template.safe_tokenizer.control
        layout = _find_layout(template)
        if layout is None and all(token in template.tokenizer.get_vocab() for token in ("<|im_start|>", "<|im_end|>")):
            layout = CHATML
        self._opening = layout[0] if layout else None
        end = layout[1] if layout else None
        self.ends = list(dict.fromkeys(text for text in (end, str(template.tokenizer.eos_token)) if text))
        ends = "|".join(map(re.escape, self.ends))
        self._answers = (
            re.compile(f"{re.escape(self._opening)}(.*?(?:{ends}|\\Z))", re.DOTALL) if self._opening else None
        )
        self._trailing_ends = re.compile(rf"(?:\s*(?:{ends}))+\s*$")

    @property
    def end_ids(self) -> list[int]:
        """Token ids of ``ends``."""
        return [int(token) for token in self._template.tokenizer.convert_tokens_to_ids(self.ends)]

    def without_ends(self, example: Example) -> Example:
        """Return an example whose answers stop before their end token: that is written after them anyway."""
        turns = tuple(
            replace(t, text=self._trailing_ends.sub("", t.text)) if t.role == "assistant" else t for t in example.turns
        )
        return replace(example, turns=turns)

    def encode(self, example: Example) -> Encoded | None:
        """Encode a row that is rendered: its answers are in the loss with their ends, all of it where it has no turns.

        Returns:
            ``None`` where the row is not rendered, and the template has to write its turns.

        Raises:
            RowError: the tokenizer cannot read it.
        """
        rendered = self._render(example)
        if rendered is None:
            return None
        template, answers = self._template, rendered.answers
        in_loss = [answer.turn for answer in answers][-1 if template.train_on == "last_assistant" else 0 :]
        tokenized = template.safe_tokenizer.tokenize(rendered, in_loss, example.where)
        every = template.train_on == "all" or not answers
        ids, loss_mask = list(tokenized.ids), [True] * len(tokenized.ids) if every else tokenized.loss_mask
        prompt_length = tokenized.token_at(answers[-1].begin) if example.text is None else 0
        prefix_length = tokenized.token_at(answers[in_loss[0]].begin) if answers else len(ids)
        while loss_mask and not loss_mask[-1]:
            ids.pop()
            loss_mask.pop()
        if template.bos_id is not None and ids[:1] != [template.bos_id]:
            ids, loss_mask, prefix_length = [template.bos_id, *ids], [every, *loss_mask], prefix_length + 1
            prompt_length += example.text is None
        return Encoded(ids, loss_mask, prompt_length, prefix_length)

    def _render(self, example: Example) -> RenderedText | None:
        if example.text is not None:
            return self._render_text(example.text)
        if [turn.role for turn in example.turns] != ["user", "assistant"]:
            return None
        prompt, answer = user_text(example.turns[0]), example.turns[1].text
        is_opened = self._opening is not None and self._opening.rstrip() in prompt
        if not is_opened and not self._control.match(prompt.lstrip()):
            return None
        out = RenderedText(f"{prompt}{answer}{self.ends[0]}")
        out.answers.append(Answer(0, len(prompt), len(out.text), len(prompt)))
        return out

    def _render_text(self, text: str) -> RenderedText:
        out = RenderedText(text)
        found = self._answers.finditer(text) if self._answers else ()
        out.answers = [Answer(number, *match.span(1), match.start(1)) for number, match in enumerate(found)]
        if not out.answers and not self._trailing_ends.search(text):
            out.text += self.ends[-1]
        return out


def _find_layout(template: Template) -> tuple[str, str] | None:
    """Return what the chat template writes before an answer, and the token right after it; ``None`` where that is not
    known. A template that is not in use (``data.template=plain``) tells it too."""
    asked, answered = {"role": "user", "content": "\ue000"}, {"role": "assistant", "content": "\ue001"}
    before, opened = template.write_chat([asked]), template.write_chat([asked], add_generation_prompt=True)
    whole = template.write_chat([asked, answered])
    if before is None or opened is None or whole is None:
        return None
    opening = _THOUGHT.sub("", opened.removeprefix(before))
    end = template.safe_tokenizer.control.match(whole.partition("\ue001")[2].lstrip())
    return (opening, end[0]) if end and opening.strip() and "\ue000" not in opening else None
