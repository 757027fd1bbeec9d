"""Generate answers with a model: batched, padded on the left, greedy or sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from trainer.config.schema import GenerateConfig
from trainer.evaluation.left_padding import reads_left_padding


class Generator:
    """Generates answers to prompts given as token ids.

    Args:
        model: a Hugging Face causal LM, wrapped by PEFT or not; under DeepSpeed the module inside the engine.
        tokenizer: its tokenizer.
        config: the ``generate`` group.
        end_ids: token ids that end an answer besides the model's own.
        device: where the prompts go.
        opening_ids: what the template has the model write before what it says; cut off.
        lockstep: the ranks' forwards are collectives (ZeRO-3), so each continues until all have finished.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: GenerateConfig,
        end_ids: Sequence[int],
        device: torch.device,
        lockstep: bool = False,
        opening_ids: Sequence[int] = (),
    ) -> None:
        self.model, self.tokenizer, self.device, self.lockstep = model, tokenizer, device, lockstep
        self.opening_ids = list(opening_ids)
        self.reads_padding = reads_left_padding(model)
        self.pad_id: int = tokenizer.pad_token_id
        own = getattr(model.generation_config, "eos_token_id", None)
        self.end_ids = sorted({*end_ids, *(own if isinstance(own, list) else [own] if own is not None else [])})
        # top_k is named because transformers would silently keep the 50 likeliest tokens only
        sampling = {"temperature": config.temperature, "top_p": config.top_p, "top_k": 0} if config.do_sample else {}
        # so is the penalty, which some models bring along: greedy means the likeliest token and nothing else
        self.options = {
            "max_new_tokens": config.max_new_tokens,
            "do_sample": config.do_sample,
            "repetition_penalty": 1.0,
            **sampling,
        }

    @torch.no_grad()
    def answer(self, prompts: Sequence[list[int]], streamer: BaseStreamer | None = None) -> list[list[int]]:
        """Generate the answers to some prompts, as token ids without the end token and without padding.

        Args:
            prompts: token ids, at least one each; they are padded on the left, so that every answer begins right after
                its prompt. Of a model that reads such padding, those of one length are answered together.
            streamer: gets each token as it comes; with one prompt only.
        """
        lengths = {len(p) for p in prompts}
        if len(lengths) > 1 and self.reads_padding:
            return self._answer_by_length(prompts)
        width = max(lengths)
        ids = torch.full((len(prompts), width), self.pad_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        out = self.model.generate(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            eos_token_id=self.end_ids,
            pad_token_id=self.pad_id,
            use_cache=True,
            synced_gpus=self.lockstep,
            streamer=streamer,
            **self.options,
        )
        return [self.cut_opening(self._cut_at_end(row[width:].tolist())) for row in out]

    def _answer_by_length(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """Answer the prompts of each length by themselves, without padding."""
        answers: dict[int, list[int]] = {}
        for length in sorted({len(p) for p in prompts}):
            which = [k for k, prompt in enumerate(prompts) if len(prompt) == length]
            answers |= zip(which, self.answer([prompts[k] for k in which]), strict=True)
        return [answers[k] for k in range(len(prompts))]

    def stream(self, prompt: list[int], write: Callable[[str], None]) -> tuple[str, str]:
        """Answer one prompt and stream its text.

        Args:
            prompt: token ids.
            write: called with each new piece of the text; together they are the answer.

        Returns:
            The answer, and how it came to its end: ``end`` (by an end token), ``length`` (it was cut at
            ``generate.max_new_tokens``) or ``interrupted`` (Ctrl-C).
        """
        streamer = AnswerStreamer(self, write)
        try:
            self.answer([prompt], streamer)
        except KeyboardInterrupt:
            streamer.end()
            return streamer.shown, "interrupted"
        return streamer.shown, "end" if streamer.has_ended else "length"

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, control tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def cut_opening(self, ids: list[int]) -> list[int]:
        """Cut off what the template has the model write before what it says: all of it and what came before, such as
        a channel for thoughts; while it is still being written, all."""
        opening, length = self.opening_ids, len(self.opening_ids)
        if not opening:
            return ids
        if ids == opening[: len(ids)]:
            return []
        ends = [i + length for i in range(len(ids) - length + 1) if ids[i : i + length] == opening]
        return ids[ends[-1] :] if ends else ids

    def _cut_at_end(self, ids: list[int]) -> list[int]:
        """Cut at the first end token; what stands behind it is padding."""
        ends = [i for i, token in enumerate(ids) if token in self.end_ids]
        return ids[: ends[0]] if ends else ids


class TokenCounter(BaseStreamer):
    """Tell of each token of one answer as it comes.

    Args:
        advance: called once a token.
    """

    def __init__(self, advance: Callable[[], None]) -> None:
        self._advance = advance
        self._has_prompt = False

    def put(self, value: Tensor) -> None:
        """Take the prompt (at first), then one token at a time."""
        if self._has_prompt:
            self._advance()
        self._has_prompt = True

    def end(self) -> None:
        """Take the end."""


class AnswerStreamer(BaseStreamer):
    """Streams the text of one answer while its tokens come.

    Args:
        generator: whose end tokens close the answer.
        write: called with each new piece of the text.

    Attributes:
        shown: the text so far.
        has_ended: whether an end token has come.
    """

    def __init__(self, generator: Generator, write: Callable[[str], None]) -> None:
        self.generator, self.write = generator, write
        self.shown, self.has_ended = "", False
        self._ids: list[int] | None = None

    def put(self, value: Tensor) -> None:
        """Take the prompt (at first), then one token at a time."""
        if self._ids is None:
            self._ids = []
            return
        for token in value.flatten().tolist():
            self.has_ended = self.has_ended or token in self.generator.end_ids
            if not self.has_ended:
                self._ids.append(token)
        text = self.generator.decode(self.generator.cut_opening(self._ids))
        if not text.endswith("\ufffd"):  # the first bytes of a letter
            self._show(text)

    def end(self) -> None:
        """Write what was held back."""
        self._show(self.generator.decode(self.generator.cut_opening(self._ids or [])))

    def _show(self, text: str) -> None:
        if text.startswith(self.shown) and text != self.shown:
            new = text[len(self.shown) :]
            self.shown = text
            self.write(new)
