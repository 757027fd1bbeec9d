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
        """Return the summed cross-entropy of one micro-batch."""

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
    rows = data.validation
    if config.eval.max_rows is not None:
        rows = Rows(rows.tables, rows.indices[: config.eval.max_rows])
    metrics: dict[str, float] = {}
    samples: list[EvalSample] = []
    answers: list[tuple[int, str, str]] = []
    with torch.no_grad():
        if "loss" in config.eval.metrics:
            metrics |= _eval_loss(scorer.loss_sum, packing, rows, world, between_batches)
        if "choice_accuracy" in config.eval.metrics:
            opening = len(data.opening_ids)
            letters = letter_tokens(
                data.validation, opening
            )  # of all rows: those that are scored may not have every letter
            limits, pad_id = packing.limits, packing.pad_id
            metrics["choice_accuracy"] = choice_accuracy(
                scorer.label_logits, rows, letters, limits, pad_id, world, between_batches, opening=opening
            )
        if written := [name for name in config.eval.metrics if name in TEXT_METRICS]:
            answers = generate_answers(generator, rows, config, world, between_batches)
        if answers:
            texts, references = [a for _, a, _ in answers], [r for _, _, r in answers]
            metrics |= {name: TEXT_METRICS[name](texts, references) for name in written}
            shown = answers[: config.eval.samples]
            records = rows.examples([row for row, _, _ in shown])
            samples = [
                EvalSample(generator.decode(record["input_ids"][: record["prompt_length"]]), reference, answer)
                for record, (_, answer, reference) in zip(records, shown, strict=True)
            ]
    return EvalResult(metrics, samples)


def _eval_loss(
    loss_sum: Callable[[MicroBatch], Tensor],
    packing: Packing,
    rows: Rows,
    world: World,
    between_batches: Callable[[], None],
) -> dict[str, float]:
    """Return the cross-entropy a label token, over all labels of all rows (nats), and its exponential."""
    examples = rows.tokens(range(len(rows)))
    total = 0.0
    layout = packing.split(examples, world.world_size)
    rounds = rows_a_round(layout.micros)
    with ProgressCounter("evaluating", len(rows), recurs=True) as counter:
        for batch, count in zip(packing.batches(examples, layout, world.rank, range(len(rows))), rounds, strict=True):
            between_batches()
            total += float(loss_sum(batch.to(world.device)))
            counter.advance(count)
    (total,) = sum_over_ranks([total], world.device)
    mean = total / rows.label_tokens(np.arange(len(rows)))
    return {"eval_loss": mean, "eval_perplexity": math.exp(min(mean, 700.0))}


def generate_answers(
    generator: Generator,
    rows: Rows,
    config: TrainConfig,
    world: World,
    between_batches: Callable[[], None] = lambda: None,
) -> list[tuple[int, str, str]]:
    """Generate an answer to each row that has a prompt (plain text has none). A collective.

    Returns:
        (row, answer, reference) of every such row, the same on all ranks.
    """
    prompt_lengths = rows.prompt_lengths
    with_prompt = np.flatnonzero(prompt_lengths)
    if not len(with_prompt):
        return []
    mine: dict[int, tuple[str, str]] = {}
    micros = split_padded(prompt_lengths[with_prompt], world.world_size, Limits(config.eval.batch_size, 0))
    with ProgressCounter("generating answers", len(with_prompt), recurs=True) as counter:
        for micro, count in zip(micros[world.rank], rows_a_round(micros), strict=True):
            between_batches()
            records = rows.examples(with_prompt[micro] if micro else [])  # a few: as Python objects, rows are big
            prompts = [record["input_ids"][: record["prompt_length"]] for record in records]
            # A rank without rows still answers one token's prompt: under ZeRO-3 its forwards are collectives.
            answers: Sequence[list[int]] = generator.answer(prompts or [[generator.pad_id]])
            mine |= {
                int(with_prompt[i]): (_without_thoughts(generator.decode(answer)), _without_thoughts(record["answer"]))
                for i, answer, record in zip(micro, answers, records, strict=False)
            }
            counter.advance(count)
    merged: dict[int, tuple[str, str]] = {}
    for part in gather_objects(mine):
        merged |= part
    return [(int(row), *merged[int(row)]) for row in with_prompt]


def _without_thoughts(text: str) -> str:
    """Return what is said after ``<think>…</think>``."""
    return text.rpartition("</think>")[2].strip()
