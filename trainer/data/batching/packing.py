"""How the examples of a step share device forwards: side by side and padded, or in tries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.data.batching.batches import MICRO, Limits, split, split_shared
from trainer.data.batching.micro_batch import MicroBatch, Tokens, padded, shared
from trainer.data.batching.trie import sort_by_tokens


@dataclass(frozen=True, slots=True)
class Layout:
    """Who computes what: ``micros[rank][k]`` are indices of examples; ``computed_tokens`` over all ranks."""

    micros: list[list[MICRO]]
    computed_tokens: int


@dataclass(frozen=True, slots=True)
class Packing:
    """The choice made for a run.

    Attributes:
        shares: examples that begin alike share their beginning in a trie; else rows are padded.
        limits: what one forward may hold.
        pad_id: fills padding.
    """

    uses_trie: bool
    limits: Limits
    pad_id: int

    def split(self, examples: Sequence[Tokens], world_size: int) -> Layout:
        """Lay examples on ranks and micro-batches, the same number on every rank; a pure function."""
        if not self.uses_trie:
            lengths = np.asarray([len(e.ids) for e in examples])
            micros = split(lengths, world_size, self.limits)
            computed = sum(int(lengths[m].max()) * len(m) if m else 1 for rank in micros for m in rank)
            return Layout(micros, computed)
        order, begins = sort_by_tokens([e.ids for e in examples])
        lengths = np.asarray([len(examples[i].ids) for i in order])
        pieces, costs = split_shared(lengths, begins, world_size, self.limits)
        return Layout([[[int(order[i]) for i in m] for m in rank] for rank in pieces], sum(costs))

    def batches(
        self, examples: Sequence[Tokens], layout: Layout, rank: int, rows: Sequence[int] | np.ndarray
    ) -> Iterator[MicroBatch]:
        """A rank's forwards.

        Args:
            examples: those that were laid.
            layout: by :meth:`split`.
            rank: whose.
            rows: what the examples are called in messages.
        """
        label_counts = [int(np.count_nonzero(e.loss_mask[1:])) for e in examples]
        for together in zip(*layout.micros, strict=True):
            most = max(sum(label_counts[i] for i in micro) for micro in together)
            mine = together[rank]
            yield self.collate([examples[i] for i in mine], [rows[i] for i in mine], most)

    def collate(self, examples: Sequence[Tokens], rows: Sequence[int] | np.ndarray, max_labels: int = 0) -> MicroBatch:
        """One forward of some examples; of none, the stand-in that adds zero. ``max_labels``: see ``MicroBatch``."""
        if self.uses_trie and examples:
            return shared(examples, rows, max_labels)
        return padded(examples, rows, self.pad_id, max_labels)
