"""Score multiple choice by log-probability: the letter that the model finds likeliest right behind the prompt."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from trainer.config.messages import as_typed
from trainer.data.batching.micro_batch import MicroBatch, Tokens
from trainer.data.batching.packing import Packing
from trainer.data.batching.rank_split import Limits, rows_a_round
from trainer.data.run_data import Rows
from trainer.distributed.process_group import World, sum_over_ranks
from trainer.errors import DataError
from trainer.tracking.counter import ProgressCounter


def choice_accuracy(
    label_logits: Callable[[MicroBatch], Tensor],
    rows: Rows,
    tokens: dict[str, int],
    limits: Limits,
    pad_id: int,
    world: World,
    between_batches: Callable[[], None] = lambda: None,
    *,
    opening: int = 0,
) -> float:
    """Return the share of rows whose right letter has the largest logit among the letters of the row's options.

    A collective. All options are weighed in one forward of the prompt, by their letters' first tokens.

    Args:
        label_logits: returns the logits at the label positions of a micro-batch, in evaluation mode.
        rows: those that are multiple choice are scored.
        tokens: of the letters, by :func:`letter_tokens`.
        limits: of a forward.
        pad_id: fills padding.
        world: this process.
        between_batches: called before each micro-batch.
        opening: tokens that the template has the model write between its prompt and the letter.

    Raises:
        DataError: none is multiple choice.
    """
    choices, answers = rows.texts("choices"), rows.texts("answer")
    with_choices = [row for row, letters in enumerate(choices) if letters]
    if not with_choices:
        reason = f"none of the {len(rows)} rows that are scored has options"
        raise DataError("eval.metrics", value="choice_accuracy", reason=reason, hint="a larger eval.max_rows")
    lengths = rows.prompt_lengths + opening
    prompts = [
        _prompt(example, lengths[row]) for row, example in zip(with_choices, rows.tokens(with_choices), strict=True)
    ]
    packing, correct = Packing(False, limits, pad_id), 0
    layout = packing.split(prompts, world.world_size)
    batches = packing.batches(prompts, layout, world.rank, with_choices)
    with ProgressCounter("evaluating choices", len(with_choices), recurs=True) as counter:
        for micro, batch, count in zip(layout.micros[world.rank], batches, rows_a_round(layout.micros), strict=True):
            between_batches()
            logits = label_logits(batch.to(world.device))
            for place, row in enumerate(micro):
                letters = choices[with_choices[row]]
                found = logits[place, [tokens[letter] for letter in letters]].float()
                correct += letters[int(found.argmax())] == answers[with_choices[row]]
            counter.advance(count)
    (total,) = sum_over_ranks([float(correct)], world.device)
    return total / len(with_choices)


def letter_tokens(rows: Rows, opening: int = 0) -> dict[str, int]:
    """Return each letter's token right behind a prompt and the template's opening of an answer (so many tokens), read
    off the rows whose answer it is.

    So a template's space or line break before the answer is in it.

    Raises:
        DataError: no row has options, a letter that is an option is nowhere the answer, or letters share a token.
    """
    wanted = set("".join(rows.texts("choices")))
    if not wanted:
        reason = "needs rows with options (data.format=multiple_choice), and no held-out row has any"
        raise DataError(
            "eval.metrics",
            value="choice_accuracy",
            reason=reason,
            hint=as_typed("eval.metrics", ["loss", "exact_match"]),
        )
    tokens: dict[str, int] = {}
    lengths, answers = rows.prompt_lengths + opening, rows.texts("answer")
    first = {answer: row for row, answer in enumerate(answers) if answer in wanted}
    for answer, example in zip(first, rows.tokens(list(first.values())), strict=True):
        tokens[answer] = int(example.ids[lengths[first[answer]]])
    if missing := sorted(wanted - set(tokens)):
        reason = f"{', '.join(missing)} is an option of held-out rows and the answer of none, so its token is not known"
        raise DataError("eval.metrics", value="choice_accuracy", reason=reason, hint="hold out more rows")
    if len(set(tokens.values())) < len(wanted):
        reason = "the letters begin with one token behind this template's prompt"
        raise DataError("eval.metrics", value="choice_accuracy", reason=reason, hint="another data.template")
    return tokens


def _prompt(example: Tokens, length: int) -> Tokens:
    """Return the prompt and the answer's first token, the only one in the loss: its position's logits are wanted."""
    loss_mask = np.zeros(length + 1, dtype=bool)
    loss_mask[-1] = True
    return Tokens(example.ids[: length + 1], loss_mask)
