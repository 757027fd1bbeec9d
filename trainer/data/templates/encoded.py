"""One example as token ids."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one example and its loss mask.

    Attributes:
        ids: token ids.
        loss_mask: whether each is in the loss.
        prompt_length: tokens before what the assistant writes in its last turn: what generation is prompted with. 0
            for text.
        prompt_prefix_length: tokens before the first one in the loss (under ``train_on=all``: before the first that
            ``completion`` would put there); all of them for plain text. Rows with equal prompt prefixes are held out
            together.
        first_turn: the first turn in the loss; ``None`` for plain text.
        asked_otherwise: turns in the loss that do not begin where the template's generation prompt ends.
        unended: turns in the loss that no end token closes.
        lost_thoughts: turns in the loss whose thoughts the template leaves out.
        has_thoughts: a turn in the loss has thoughts.
        drops_tools: the template has left out the row's tools.
    """

    ids: list[int]
    loss_mask: list[bool]
    prompt_length: int
    prompt_prefix_length: int
    first_turn: int | None = None
    asked_otherwise: int = 0
    unended: int = 0
    lost_thoughts: int = 0
    has_thoughts: bool = False
    drops_tools: bool = False
