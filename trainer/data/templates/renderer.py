"""Run a chat template, which is code of its author's: whatever it raises, and however long it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateSyntaxError

from trainer.data.sources.rows import RowError
from trainer.data.templates.skeleton import Message
from trainer.data.templates.time_limit import TimeLimit, TimeLimitExceeded
from trainer.errors import DataError

MAX_RENDERED = 64 << 20  # characters of one conversation
_TIME_LIMIT = TimeLimit(10.0)  # a rendering takes milliseconds


class Renderer:
    """Renders conversations by one chat template.

    Args:
        tokenizer: a Hugging Face tokenizer.
        source: the template; ``None`` takes the tokenizer's own.
        called: its name in messages.
        hint: what to do where it refuses a conversation.
        template_kwargs: more variables of the template's.
    """

    def __init__(
        self, tokenizer: Any, source: str | None, called: str, hint: str, template_kwargs: Mapping[str, Any]
    ) -> None:
        self._tokenizer, self._source, self._called, self._hint = tokenizer, source, called, hint
        self._kwargs = dict(template_kwargs)

    def render(
        self, messages: list[Message], tools: Sequence[Any] | None, add_generation_prompt: bool, where: str
    ) -> str:
        """Render a conversation.

        Raises:
            RowError: ``template``: the template refuses it.
            DataError: it is no template, or does not come to its end.
        """
        try:
            with _TIME_LIMIT.limited():
                text = str(
                    self._tokenizer.apply_chat_template(
                        messages,
                        tools=list(tools) if tools else None,
                        chat_template=self._source,
                        tokenize=False,
                        add_generation_prompt=add_generation_prompt,
                        **self._kwargs,
                    )
                )
            if len(text) > MAX_RENDERED:
                raise ValueError(f"it writes {len(text)} characters")
            return text
        except TimeLimitExceeded as error:
            reason = f"does not end within {_TIME_LIMIT.seconds:.0f} s on {where}"
            raise DataError(self._called, reason=reason, hint="data.template=alpaca, or FILE.jinja") from error
        except TemplateSyntaxError as error:
            raise DataError(
                self._called, reason=f"is no chat template: line {error.lineno}: {error.message}", hint="fix it"
            ) from error
        except Exception as error:  # a template is code of its author's: whatever it raises is about these turns
            message = " ".join(str(error).split())[:200]
            reason = f"{self._called} refuses the turns {roles_of(messages)} ({message})"
            raise self.error(where, reason, self._hint) from error

    def render_or_none(
        self, messages: list[Message], tools: Sequence[Any] | None = None, add_generation_prompt: bool = False
    ) -> str | None:
        """Render a conversation, or return ``None`` where the template refuses it."""
        try:
            return self.render(messages, tools, add_generation_prompt, self._called)
        except RowError:
            return None

    def error(self, where: str, reason: str, hint: str) -> RowError:
        """Return the error of a row that the template does not write as it should."""
        return RowError("template", where, reason=reason, hint=hint)


def roles_of(messages: Sequence[Message]) -> str:
    """Name the roles of a conversation in their order, the middle of a long one left out."""
    roles = [m["role"] for m in messages]
    return " → ".join(roles if len(roles) <= 8 else [*roles[:4], "…", *roles[-3:]])
