"""Accuracy on multiple choice by log-probability: which letter the model finds likeliest right behind the prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from trainer.data.batches import Limits
from trainer.data.load import Rows
from trainer.data.micro import MicroBatch, Tokens
from trainer.data.packing import Packing
from trainer.distributed import World, sum_over_ranks
from trainer.errors import DataError

FEW = 64  # rows that are looked through for a letter's token, at a time


def choice_accuracy(
    label_logits: Callable[[MicroBatch], Tensor], rows: Rows, limits: Limits, pad_id: int, world: World
) -> float:
    """Share of rows whose right letter has the largest logit among the letters of the row's options.

    A collective. All options are weighed in one forward of the prompt, for each is one token.

    Args:
        label_logits: logits at the label positions of a micro-batch, in evaluation mode.
        rows: some of which are multiple choice.
        limits: of a forward.
        pad_id: fills padding.
        world: this process.

    Raises:
        DataError: no row has options, or its letters are not one token each.
    """
    choices = rows.choices
    asked = [row for row, letters in enumerate(choices) if letters]
    if not asked:
        rule = "needs rows with options (data.format=multiple_choice), and no held-out row has any"
        raise DataError("eval.metrics", value="choice_accuracy", rule=rule, cure="eval.metrics=[loss,exact_match]")
    tokens = letter_tokens(rows, asked)
    records = rows.examples(asked)
    prompts = [_prompt(record) for record in records]
    packing, right = Packing(False, limits, pad_id), 0
    layout = packing.split(prompts, world.world_size)
    micros = layout.micros[world.rank]
    for micro, batch in zip(micros, packing.batches(prompts, layout, world.rank, asked), strict=True):
        logits = label_logits(batch.to(world.device))
        for place, row in enumerate(micro):
            letters = choices[asked[row]]
            found = logits[place, [tokens[letter] for letter in letters]].float()
            right += letters[int(found.argmax())] == records[row]["answer"].strip()
    (total,) = sum_over_ranks([float(right)], world.device)
    return total / len(asked)


def letter_tokens(rows: Rows, asked: Sequence[int]) -> dict[str, int]:
    """Each letter's token right behind a prompt, read off the rows whose answer it is.

    So that a template's space or line break before the answer is in it.

    Raises:
        DataError: a letter that is an option is nowhere the answer, or is more than one token.
    """
    tokens: dict[str, int] = {}
    wanted = set("".join(rows.choices))
    for begin in range(0, len(asked), FEW):
        for record in rows.examples(asked[begin : begin + FEW]):
            tokens.setdefault(record["answer"].strip(), int(record["input_ids"][record["prompt_length"]]))
        if wanted <= set(tokens):
            break
    if missing := sorted(wanted - set(tokens)):
        rule = f"{', '.join(missing)} is an option of held-out rows and the answer of none, so its token is not known"
        raise DataError("eval.metrics", value="choice_accuracy", rule=rule, cure="hold out more rows")
    if len({tokens[letter] for letter in wanted}) < len(wanted):
        rule = "the letters are not one token each behind this template's prompt"
        raise DataError("eval.metrics", value="choice_accuracy", rule=rule, cure="another data.template")
    return tokens


def _prompt(record: dict[str, Any]) -> Tokens:
    """The prompt and the answer's first token, of which only that is a label: its position's logits are wanted."""
    ids = np.asarray(record["input_ids"][: record["prompt_length"] + 1], dtype=np.int32)
    labels = np.zeros(len(ids), dtype=bool)
    labels[-1] = True
    return Tokens(ids, labels)
