"""Collect the overview from prepared data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from trainer.config.schema import TrainConfig
from trainer.data.load import inspect_data, load_data
from trainer.data.run_data import Data
from trainer.errors import DataError
from trainer.view import choose
from trainer.view.overview import MAX_LONG_ROWS, Overview, ShownExample, SourceSummary, sample_rejected
from trainer.view.pieces import TokenDecoder
from trainer.view.sharing import measure_sharing
from trainer.view.words import LEVELS

PAGE_EXAMPLES = 200
PAGE_TOKENS = 200_000  # of all examples of a page: some megabytes, and a second


def load_or_inspect(config: TrainConfig, tokenizer: Any) -> tuple[Data, DataError | None]:
    """Load the data as training would; and if training would refuse it, as it is, with the error.

    Raises:
        DataError: there is nothing to look at: a source cannot be used, or holds no usable row.
    """
    try:
        return load_data(config, tokenizer), None
    except DataError as error:
        return inspect_data(config, tokenizer), error


def collect_overview(data: Data, config: TrainConfig, tokenizer: Any, refusal: DataError | None) -> Overview:
    """Collect the overview, without examples yet."""
    findings = [finding for finding in data.findings if finding.count]
    findings.sort(key=lambda f: (LEVELS.index(f.level) if f.level in LEVELS else len(LEVELS), -f.count))
    files = dict.fromkeys(part.refused_file for part in data.parts if part.refused or part.dropped)
    return Overview(
        model=config.model.name_or_path,
        tokenizer=f"{len(tokenizer):,} tokens",
        template=config.data.template,
        train_on=config.data.train_on,
        packing=config.batch.packing,
        max_length=config.data.max_length,
        sources=tuple(
            SourceSummary(p.names, p.format, len(p), p.refused, p.dropped, p.truncated, p.refused_file)
            for p in data.parts
        ),
        train_rows=len(data.train),
        held_out_rows=len(data.validation),
        lengths=data.train.lengths,
        label_tokens=data.train.label_tokens(np.arange(len(data.train))),
        longest=_longest(data),
        sharing=measure_sharing(data, config, tokenizer.pad_token_id),
        findings=tuple(findings),
        refused=sample_rejected(list(files)),
        error=None if refusal is None else str(refusal),
    )


def few_examples(data: Data, config: TrainConfig, decoder: TokenDecoder, most: int) -> tuple[ShownExample, ...]:
    """Decode a few rows, for a terminal."""
    return tuple(_shown(data, decoder, choose.choose_few(data, config, decoder.control_ids, most)))


def many_examples(data: Data, config: TrainConfig, decoder: TokenDecoder) -> tuple[ShownExample, ...]:
    """Decode rows for a page: up to ``PAGE_EXAMPLES``, of ``PAGE_TOKENS`` together."""
    choices = choose.choose_many(data, config, decoder.control_ids, PAGE_EXAMPLES)
    return tuple(_within(_shown(data, decoder, choices), PAGE_TOKENS))


def _longest(data: Data) -> tuple[tuple[str, int], ...]:
    """Return names and tokens of the longest training rows, each once however often a mixture takes it."""
    rows = choose.longest(data.train, MAX_LONG_ROWS)
    return tuple(zip(data.train.names(rows), data.train.lengths[rows].tolist(), strict=True)) if rows else ()


def _shown(data: Data, decoder: TokenDecoder, choices: Iterable[choose.Choice]) -> Iterator[ShownExample]:
    for choice in choices:
        rows = data.validation if choice.held_out else data.train
        (tokens,) = rows.tokens([choice.row])
        pieces = decoder.pieces(tokens.ids.tolist(), tokens.loss_mask.tolist())
        loss_tokens = int(tokens.loss_mask[1:].sum())
        (name,) = rows.names([choice.row])
        yield ShownExample(name, choice.held_out, tuple(choice.why), len(tokens.ids), loss_tokens, tuple(pieces))


def _within(examples: Iterator[ShownExample], most_tokens: int) -> Iterator[ShownExample]:
    """Take the first one, and more while their tokens fit."""
    for example in islice(examples, 1):
        most_tokens -= example.tokens
        yield example
    for example in examples:
        most_tokens -= example.tokens
        if most_tokens < 0:
            return
        yield example
