"""Measure what a run would compute, in tries of shared prefixes and padded, on a sample of its steps; no model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.config.schema import TrainConfig
from trainer.data.batching.global_batch import global_batch, total_steps
from trainer.data.batching.packing import Packing
from trainer.data.batching.rank_split import Limits
from trainer.data.run_data import Data

MAX_STEPS = 32
MAX_TOKENS, MAX_ROWS = 2_000_000, 16_000  # of all sampled steps: either takes about a second


@dataclass(frozen=True, slots=True)
class Sharing:
    """The tokens of the sampled steps, on one device.

    Attributes:
        steps: updates of the run.
        examples: of an update.
        sampled: steps that were laid out.
        rows: examples in them; of a huge step only so many are laid out.
        useful_tokens: the examples' own.
        trie_tokens, padded_tokens: what the device would run.
    """

    steps: int
    examples: int
    sampled: int
    rows: int
    useful_tokens: int
    trie_tokens: int
    padded_tokens: int

    @property
    def useful_a_step(self) -> float:
        return self.useful_tokens / self.rows * self.examples

    @property
    def shared_share(self) -> float:
        """Share of the useful tokens that a trie need not compute: they are in a prefix of another example too."""
        return 1 - self.trie_tokens / self.useful_tokens

    @property
    def padding_share(self) -> float:
        """Share of the tokens computed in padded rows that are padding."""
        return 1 - self.useful_tokens / self.padded_tokens


def measure_sharing(data: Data, config: TrainConfig, pad_id: int) -> Sharing | None:
    """Lay out up to ``MAX_STEPS`` steps, evenly spread over the run, as one device would; ``None`` without rows."""
    rows = len(data.train)
    if not rows:
        return None
    batch = config.batch
    examples = min(batch.global_size, rows)
    steps = total_steps(rows, examples, batch.epochs, batch.max_steps)
    laid = min(examples, MAX_ROWS)
    mean = max(1.0, float(np.mean(data.train.lengths)))
    affordable = max(1, min(MAX_STEPS, MAX_ROWS // laid, int(MAX_TOKENS / (mean * laid))))
    sampled = np.unique(np.linspace(0, steps - 1, min(affordable, steps)).astype(np.int64))
    limits = Limits(batch.micro_size, batch.micro_tokens)
    useful, computed = 0, {True: 0, False: 0}
    for step in sampled:
        tokens = data.train.tokens(global_batch(config.run.seed, int(step), rows, examples)[:laid])
        useful += sum(len(t.ids) for t in tokens)
        for uses_trie in computed:
            computed[uses_trie] += Packing(uses_trie, limits, pad_id).split(tokens, 1).computed_tokens
    return Sharing(steps, examples, len(sampled), laid * len(sampled), useful, computed[True], computed[False])
