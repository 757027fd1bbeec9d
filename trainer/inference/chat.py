"""Chat with a run's model: on a terminal, or line by line from a pipe."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

import torch

from trainer.data.formats.turns import Turn
from trainer.data.sources.rows import RowError
from trainer.data.templates.template import Template
from trainer.errors import AfinaError, ConfigError
from trainer.evaluation.generator import Generator
from trainer.inference.run_model import RunModel, load_run
from trainer.methods import virtual_tokens

logger = logging.getLogger(__name__)

HELP = """/adapter NAME  answer with another adapter; what was said is kept
/adapters      their names; * is the one that answers
/reset         forget what was said
/help          this
/exit          end; so does the end of the input
A line that is to begin with / begins with a space."""
COMMANDS = ("/adapter", "/adapters", "/reset", "/help", "/exit")


class Chat:
    """Hold one conversation, answered by one adapter at a time.

    Args:
        loaded: a run's model.
        write: called with each new piece of an answer's text, and with a newline at its end; all else is logged.

    Attributes:
        turns: the conversation so far.
        max_prompt_tokens: so that a whole answer fits behind the prompt.
    """

    def __init__(self, loaded: RunModel, write: Callable[[str], None]) -> None:
        self.loaded, self.write = loaded, write
        data_config = loaded.config.data
        self.template = Template.from_config(loaded.tokenizer, data_config)
        self.has_turns = data_config.template == "chat" or self.template.chat_template is not None
        self.end_ids, self.opening_ids = self.template.end_ids(), self.template.opening_ids()
        self.turns: list[Turn] = []
        self._use_adapter(str(loaded.switcher.name))
        torch.manual_seed(loaded.config.run.seed)

    def _use_adapter(self, name: str) -> None:
        model = self.loaded.switcher.use(name)
        config = self.loaded.config
        self.generator = Generator(
            model, self.loaded.tokenizer, config.generate, self.end_ids, model.device, opening_ids=self.opening_ids
        )
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        max_length = config.data.max_length
        if positions:
            max_length = min(max_length, positions - virtual_tokens(model))
        self.max_prompt_tokens = max_length - config.generate.max_new_tokens
        if self.max_prompt_tokens < 1:
            value = config.generate.max_new_tokens
            reason = f"leaves no room for a prompt in {max_length} tokens (data.max_length, or the model's positions)"
            raise ConfigError("generate.max_new_tokens", value=value, reason=reason, hint="a smaller one")

    def handle_line(self, line: str) -> bool:
        """Answer one line of the user, or run its command; return false when it is the last one."""
        if not line.startswith("/"):
            if line.strip():
                self._answer(line.strip())
            return True
        command, _, rest = line.strip().partition(" ")
        if command == "/exit":
            return False
        if command == "/adapter" and rest.strip():
            self._switch_adapter(rest.strip())
        elif command in ("/adapter", "/adapters"):
            current = self.loaded.switcher.name
            logger.info(
                "\n".join(f"{'*' if name == current else ' '} {name}" for name in self.loaded.switcher.adapters)
            )
        elif command == "/reset":
            self.turns = []
            logger.info("forgotten")
        elif command == "/help":
            logger.info(HELP)
        else:
            near = get_close_matches(command, COMMANDS, n=1)
            logger.info(f"{command}: there is no such command → {near[0] if near else '/help'}")
        return True

    def _switch_adapter(self, name: str) -> None:
        before = str(self.loaded.switcher.name)
        try:
            self._use_adapter(name)
        except AfinaError as error:
            logger.error(error)
            self._use_adapter(before)
        logger.info(f"answering: {self.loaded.switcher.name}")

    def _answer(self, text: str) -> None:
        turns = [*self.turns, Turn("user", text)] if self.has_turns else [Turn("user", text)]
        try:
            turns, prompt = self._fit_turns(turns)
        except RowError as error:
            logger.error(error)
            return
        if prompt is None:
            return
        answer, ending = self.generator.stream(prompt, self.write)
        self.write("\n")
        if ending == "length":
            logger.info(f"(cut after {self.loaded.config.generate.max_new_tokens} tokens: generate.max_new_tokens)")
        if self.has_turns:
            self.turns = [*turns, Turn("assistant", answer)]

    def _fit_turns(self, turns: list[Turn]) -> tuple[list[Turn], list[int] | None]:
        """Drop the oldest rounds until an answer fits behind the rest; return the turns and their token ids, ``None``
        when even the last is too long."""
        prompt, dropped = self.template.encode_turns(turns), 0
        while len(prompt) > self.max_prompt_tokens and len(turns) > 1:
            turns, dropped = turns[2:], dropped + 1
            prompt = self.template.encode_turns(turns)
        if len(prompt) > self.max_prompt_tokens:
            hint = "a shorter one, or data.max_length=N"
            logger.error(f"that takes {len(prompt)} tokens, and there is room for {self.max_prompt_tokens} → {hint}")
            return turns, None
        if dropped:
            logger.info(
                f"(the oldest {dropped} rounds were forgotten: there is room for {self.max_prompt_tokens} tokens)"
            )
        return turns, prompt


def chat_run(
    run: Path,
    *,
    adapter: bool = True,
    adapters: Sequence[str] = (),
    bits: int | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """Chat with a run's model until the input ends. Answers go to stdout, all else is logged.

    Args:
        run: a run folder; its data may be gone.
        adapter, adapters, bits, overrides: as in :func:`~trainer.inference.run_model.load_run`.
    """
    loaded = load_run(run, overrides, adapter=adapter, adapters=adapters, bits=bits, with_data=False)
    for note in loaded.notes:
        logger.info(f"note: {note}")
    chat = Chat(loaded, _write_stdout)
    if not chat.has_turns:
        logger.info(f"data.template={loaded.config.data.template} has no turns: each prompt is answered alone")
    logger.info(f"answering: {loaded.switcher.name}; /help")
    for line in _read_lines(lambda: str(loaded.switcher.name)):
        if not chat.handle_line(line):
            return


def _read_lines(prompt_name: Callable[[], str]) -> Iterator[str]:
    """Read what the user types, until the end of the input (or Ctrl-C)."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in _read_pipe())
        return
    import readline  # noqa: F401 - arrow keys and history for input()

    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True)
    while True:
        try:
            line = console.input(f"[bold]{escape(prompt_name())} ›[/] ")
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        yield line


def _read_pipe() -> Iterator[str]:
    """Read lines of stdin; bytes that are no UTF-8 become replacement characters."""
    for line in sys.stdin.buffer:
        yield line.decode("utf-8", errors="replace")


def _write_stdout(text: str) -> None:
    print(text, end="", flush=True)
