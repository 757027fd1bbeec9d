"""Pack the examples of a step into micro-batches: padded rows, or tries of shared prefixes (sequence packing).

Plain sequence packing lays examples one behind the other to avoid padding; a trie does that too, and besides computes a
shared prefix once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.data.batching.micro_batch import MicroBatch, Tokens, collate_padded, collate_trie
from trainer.data.batching.rank_split import Indices, Limits, split_padded, split_tries
from trainer.data.batching.trie import sort_by_tokens


@dataclass(frozen=True, slots=True)
class Layout:
    """Which rank computes which examples in which micro-batch.

    Attributes:
        micros: ``micros[rank][k]`` are the indices of the examples of a rank's k-th micro-batch.
        computed_tokens: what the devices run, over all ranks.
    """

    micros: list[list[Indices]]
    computed_tokens: int


@dataclass(frozen=True, slots=True)
class Packing:
    """How a run packs examples into device forwards.

    Attributes:
        uses_trie: examples with a shared prefix compute it once, in a trie; else rows are padded.
        limits: what one forward may hold.
        pad_id: fills padding.
        in_pieces: attention is laid out for varlen calls, in padded rows too.
        with_noise: embeddings will get noise, whose size depends on the rows' lengths.
    """

    uses_trie: bool
    limits: Limits
    pad_id: int
    in_pieces: bool = False
    with_noise: bool = False

    def split(self, examples: Sequence[Tokens], world_size: int) -> Layout:
        """Split examples over ranks and micro-batches, the same number on every rank; a pure function."""
        if not self.uses_trie:
            lengths = np.asarray([len(e.ids) for e in examples])
            micros = split_padded(lengths, world_size, self.limits)
            computed = sum(int(lengths[m].max()) * len(m) if m else 1 for rank in micros for m in rank)
            return Layout(micros, computed)
        order, shared = sort_by_tokens([e.ids for e in examples])
        lengths = np.asarray([len(examples[i].ids) for i in order])
        micros, costs = split_tries(lengths, shared, world_size, self.limits)
        return Layout([[[int(order[i]) for i in m] for m in rank] for rank in micros], sum(costs))

    def batches(
        self, examples: Sequence[Tokens], layout: Layout, rank: int, rows: Sequence[int] | np.ndarray
    ) -> Iterator[MicroBatch]:
        """Collate a rank's micro-batches, one after the other.

        Args:
            examples: of the step.
            layout: theirs, by :meth:`split`.
            rank: of this process.
            rows: indices of the examples in the training or held-out rows, for messages.
        """
        label_counts = [int(np.count_nonzero(e.loss_mask[1:])) for e in examples]
        for together in zip(*layout.micros, strict=True):
            max_labels = max(sum(label_counts[i] for i in micro) for micro in together)
            mine = together[rank]
            yield self.collate([examples[i] for i in mine], [rows[i] for i in mine], max_labels)

    def collate(self, examples: Sequence[Tokens], rows: Sequence[int] | np.ndarray, max_labels: int = 0) -> MicroBatch:
        """Collate examples into one micro-batch; none into the stand-in that adds zero. ``max_labels``: see
        ``MicroBatch``."""
        if self.uses_trie and examples:
            return collate_trie(examples, rows, max_labels, self.in_pieces, self.with_noise)
        return collate_padded(examples, rows, self.pad_id, max_labels, self.in_pieces, self.with_noise)
