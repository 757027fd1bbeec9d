"""Token tensors of one device forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows of one forward, padded on the right.

    Attributes:
        input_ids: int64, shape (rows, width).
        attention_mask: int64, shape (rows, width); 1 on tokens, 0 on padding.
        source: int64, shape (labels,): the flattened position whose hidden state predicts each label.
        target: int64, shape (labels,): the label's token id.
        weight: float32, shape (labels,): how often the label counts in the loss.
        useful_tokens: the examples' own tokens.
        rows: indices of the examples in the prepared table, for messages.
    """

    input_ids: Tensor
    attention_mask: Tensor
    source: Tensor
    target: Tensor
    weight: Tensor
    useful_tokens: int
    rows: tuple[int, ...]

    @property
    def computed_tokens(self) -> int:
        """Tokens the device runs, padding included; an empty micro-batch's stand-in counts too."""
        return self.input_ids.numel()

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with its tensors on ``device``."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return MicroBatch(
            **{k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in values.items()}
        )


def padded(examples: Sequence[dict[str, Any]], rows: Sequence[int], pad_id: int) -> MicroBatch:
    """Lay examples side by side, padded on the right to the longest.

    Without examples, a stand-in of one token and no label is returned: the forward runs the same collectives as on the
    other ranks and adds exactly zero.

    Args:
        examples: each with ``input_ids`` and ``labels`` of one length; a label on the first token has nothing to be
            predicted from and is left out.
        rows: their indices in the prepared table.
        pad_id: fills the padding; masked, so any id gives the same result.
    """
    width = max((len(e["input_ids"]) for e in examples), default=1)
    ids = torch.full((max(1, len(examples)), width), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    source: list[int] = []
    target: list[int] = []
    for row, example in enumerate(examples):
        tokens = example["input_ids"]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        for position, label in enumerate(example["labels"]):
            if label and position:
                source.append(row * width + position - 1)
                target.append(tokens[position])
    if not examples:
        mask[:] = 1
    return MicroBatch(
        input_ids=ids,
        attention_mask=mask,
        source=torch.tensor(source, dtype=torch.int64),
        target=torch.tensor(target, dtype=torch.int64),
        weight=torch.ones(len(source), dtype=torch.float32),
        useful_tokens=sum(len(e["input_ids"]) for e in examples),
        rows=tuple(int(r) for r in rows),
    )
