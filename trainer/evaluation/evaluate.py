"""Evaluate held-out rows, on all ranks at once: the loss, multiple choices, generated answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from trainer.config.schema import TrainConfig
from trainer.data.batching.micro_batch import MicroBatch
from trainer.data.batching.packing import Packing
from trainer.data.batching.rank_split import Limits, rows_a_round, split_padded
from trainer.data.run_data import Data, Rows
from trainer.distributed.process_group import World, gather_objects, sum_over_ranks
from trainer.evaluation.generator import Generator
from trainer.evaluation.multiple_choice import choice_accuracy, letter_tokens
from trainer.evaluation.text_metrics import TEXT_METRICS
from trainer.tracking.counter import ProgressCounter

Answer = tuple[int, str, str]  # a row, what was generated, and its reference


@dataclass(frozen=True, slots=True)
class EvalSample:
    """One held-out row: its prompt and reference, and the answer that was generated."""

    prompt: str
    reference: str
    answer: str


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Metrics by their name in metrics.jsonl, and some generated answers to look at (on rank 0)."""

    metrics: dict[str, float]
    samples: list[EvalSample]


class Scorer(Protocol):
    """Scores micro-batches with a model in evaluation mode: the engine, or a plain model."""

    def loss_sum(self, batch: MicroBatch) -> Tensor:
        """Return the summed cross-entropy of one micro-batch: a scalar, or one a trial, (trials,)."""

    def label_logits(self, batch: MicroBatch) -> Tensor:
        """Return the logits at its label positions, (labels, vocabulary)."""


def evaluate(
    scorer: Scorer,
    generator: Generator,
    packing: Packing,
    data: Data,
    config: TrainConfig,
    world: World,
    *,
    between_batches: Callable[[], None] = lambda: None,
) -> EvalResult:
    """Score the held-out rows by ``eval.metrics``. A collective: every rank calls it and gets the same metrics.

    Args:
        scorer: the model.
        generator: answers prompts with the same model.
        packing: how rows share a forward.
        data: whose ``validation`` rows are scored, at most ``eval.max_rows``.
        config: the whole configuration.
        world: this process.
        between_batches: called before each, as often on every rank; it may raise, which ends the evaluation.
    """
    (result,) = evaluate_trials(
        scorer, [scorer], generator, packing, data, config, world, between_batches=between_batches
    )
    return result


def evaluate_trials(
    together: Scorer,
    scorers: Sequence[Scorer],
    generator: Generator,
    packing: Packing,
    data: Data,
    config: TrainConfig,
    world: World,
    *,
    between_batches: Callable[[], None] = lambda: None,
) -> list[EvalResult]:
    """Score the held-out rows with each of several trials on one base, as :func:`evaluate` does with one. A collective.

    Args:
        together: gives the loss sums of all trials in one forward, (trials,).
        scorers: one a trial.
        generator: whose model answers prompts for all trials at once, a trial's rows one after the other.
        packing: how rows share a forward.
        data, config, world, between_batches: as in :func:`evaluate`; ``config``: of any of the trials.
    """
    rows, trials = data.validation, len(scorers)
    if config.eval.max_rows is not None:
        rows = Rows(rows.tables, rows.indices[: config.eval.max_rows])
    metrics: list[dict[str, float]] = [{} for _ in scorers]
    samples: list[list[EvalSample]] = [[] for _ in scorers]
    with torch.no_grad():
        if "loss" in config.eval.metrics:
            for own, found in zip(metrics, _eval_losses(together, packing, rows, world, between_batches), strict=True):
                own |= found
        if "choice_accuracy" in config.eval.metrics:
            opening = len(data.opening_ids)
            # of all rows: those that are scored may not have every letter
            letters = letter_tokens(data.validation, opening)
            for own, scorer in zip(metrics, scorers, strict=True):
                limits, pad_id = packing.limits, packing.pad_id
                own["choice_accuracy"] = choice_accuracy(
                    scorer.label_logits, rows, letters, limits, pad_id, world, between_batches, opening=opening
                )
        if written := [name for name in config.eval.metrics if name in TEXT_METRICS]:
            answers = generate_answers(generator, rows, config, world, between_batches, trials)
            for k, mine in enumerate(answers):
                metrics[k] |= _score_texts(written, mine)
                samples[k] = _samples(generator, rows, mine[: config.eval.samples])
    return [EvalResult(*result) for result in zip(metrics, samples, strict=True)]


def _score_texts(names: Sequence[str], answers: Sequence[Answer]) -> dict[str, float]:
    texts, references = [answer for _, answer, _ in answers], [reference for _, _, reference in answers]
    return {name: TEXT_METRICS[name](texts, references) for name in names} if answers else {}


def _samples(generator: Generator, rows: Rows, shown: Sequence[Answer]) -> list[EvalSample]:
    records = rows.examples([row for row, _, _ in shown]) if shown else []
    return [
        EvalSample(generator.decode(record["input_ids"][: record["prompt_length"]]), reference, answer)
        for record, (_, answer, reference) in zip(records, shown, strict=True)
    ]


def _eval_losses(
    scorer: Scorer, packing: Packing, rows: Rows, world: World, between_batches: Callable[[], None]
) -> list[dict[str, float]]:
    """Return, of each trial, the cross-entropy a label token, over all rows (nats), and its exponential."""
    examples = rows.tokens(range(len(rows)))
    totals: list[float] = []
    layout = packing.split(examples, world.world_size)
    rounds = rows_a_round(layout.micros)
    with ProgressCounter("evaluating", len(rows), recurs=True) as counter:
        for batch, count in zip(packing.batches(examples, layout, world.rank, range(len(rows))), rounds, strict=True):
            between_batches()
            sums = scorer.loss_sum(batch.to(world.device)).reshape(-1).tolist()
            totals = [total + own for total, own in zip(totals or [0.0] * len(sums), sums, strict=True)]
            counter.advance(count)
    labels = rows.label_tokens(np.arange(len(rows)))
    means = [total / labels for total in sum_over_ranks(totals, world.device)]
    return [{"eval_loss": mean, "eval_perplexity": math.exp(min(mean, 700.0))} for mean in means]


def generate_answers(
    generator: Generator,
    rows: Rows,
    config: TrainConfig,
    world: World,
    between_batches: Callable[[], None] = lambda: None,
    trials: int = 1,
) -> list[list[Answer]]:
    """Generate an answer to each row that has a prompt (plain text has none). A collective.

    Args:
        generator: whose model answers for so many trials at once.
        rows, config, world, between_batches: as in :func:`evaluate_trials`.
        trials: how many there are.

    Returns:
        Of each trial (row, answer, reference) of every such row, the same on all ranks.
    """
    prompt_lengths = rows.prompt_lengths
    with_prompt = np.flatnonzero(prompt_lengths)
    if not len(with_prompt):
        return [[] for _ in range(trials)]
    mine: dict[int, tuple[list[str], str]] = {}
    at_once = _rows_of_a_trial(config, int(prompt_lengths.max()), trials)
    # One forward for each length would be more on some ranks than on others.
    limits = Limits(1 if generator.reads_padding and generator.lockstep else at_once, 0)
    micros = split_padded(prompt_lengths[with_prompt], world.world_size, limits)
    with ProgressCounter("generating answers", len(with_prompt), recurs=True) as counter:
        for micro, count in zip(micros[world.rank], rows_a_round(micros), strict=True):
            between_batches()
            records = rows.examples(with_prompt[micro] if micro else [])  # a few: as Python objects, rows are big
            # A rank without rows still answers one token's prompt: under ZeRO-3 its forwards are collectives.
            prompts = [record["input_ids"][: record["prompt_length"]] for record in records] or [[generator.pad_id]]
            found = [_without_thoughts(generator.decode(ids)) for ids in generator.answer(prompts * trials)]
            for place, (i, record) in enumerate(zip(micro, records, strict=True)):
                own = found[place :: len(prompts)]
                mine[int(with_prompt[i])] = own, _without_thoughts(record["answer"])
            counter.advance(count)
    merged: dict[int, tuple[list[str], str]] = {}
    for part in gather_objects(mine):
        merged |= part
    return [[(int(row), merged[int(row)][0][k], merged[int(row)][1]) for row in with_prompt] for k in range(trials)]


def _rows_of_a_trial(config: TrainConfig, longest: int, trials: int) -> int:
    """Return how many prompts of a trial are answered at once: of one trial ``eval.batch_size``; of several as many in
    all, or what ``batch.micro_tokens`` hold, since a token more of each takes hardly longer for more rows."""
    if trials == 1:
        return config.eval.batch_size
    held = config.batch.micro_tokens // (longest + config.generate.max_new_tokens)
    return max(1, max(config.eval.batch_size, held) // trials)


def _without_thoughts(text: str) -> str:
    """Return what is said after ``<think>…</think>``."""
    return text.rpartition("</think>")[2].strip()
