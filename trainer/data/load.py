"""The examples of a run: training rows and held-out rows, ready to be cut into micro-batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.schema import TrainConfig
from trainer.data.batches import total_steps
from trainer.data.micro import Tokens
from trainer.data.prepare import Prepared, default_cache, prepare
from trainer.data.split import split_rows
from trainer.data.templates import Template
from trainer.errors import DataError


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a prepared table, numbered from 0.

    Attributes:
        prepared: the table.
        indices: which of its rows, int64.
    """

    prepared: Prepared
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens an example, int32, shape (rows,)."""
        return self.prepared.lengths[self.indices]

    def label_tokens(self, which: np.ndarray) -> int:
        """Labels of some rows that enter the loss."""
        return int(self.prepared.label_counts[self.indices[which]].sum())

    def examples(self, which: Sequence[int]) -> list[dict[str, Any]]:
        """The records of some rows, in the order asked for."""
        if not len(which):
            return []
        columns = self.prepared.table[[int(self.indices[i]) for i in which]]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def tokens(self, which: Sequence[int] | np.ndarray) -> list[Tokens]:
        """Token ids and labels of some rows, in the order asked for, without a Python object a token."""
        wanted = [int(self.indices[i]) for i in which]
        if not wanted:
            return []
        table = self.prepared.table.with_format("arrow")[wanted]
        ids, labels = (table.column(name).combine_chunks() for name in ("input_ids", "labels"))
        ends = ids.offsets.to_numpy()[1:-1] - ids.offsets[0].as_py()
        flat_ids = ids.flatten().to_numpy()
        flat_labels = labels.flatten().to_numpy(zero_copy_only=False)
        return [Tokens(*pair) for pair in zip(np.split(flat_ids, ends), np.split(flat_labels, ends), strict=True)]

    def names(self, which: Sequence[int]) -> list[str]:
        """``file:line`` of some rows."""
        return [self.prepared.name_of(int(self.indices[i])) for i in which]


@dataclass(frozen=True, slots=True)
class Data:
    """What a run trains on and is scored on.

    Attributes:
        train: training rows.
        validation: held-out rows; empty when none are held out.
        fingerprint: digest of both tables and of the split; a resumed run must find the same.
        end_ids: token ids that end an answer, as the template writes them.
    """

    train: Rows
    validation: Rows
    fingerprint: str
    end_ids: tuple[int, ...]


def load_data(config: TrainConfig, tokenizer: Any, say: Callable[[str], None]) -> Data:
    """Prepare (or find) the tables and split them. Needs no process group; every rank gets the same.

    Raises:
        DataError: a row is refused, or there are fewer training rows than ``batch.global_size``.
    """
    keys = config.data
    cache = Path(keys.cache_dir) if keys.cache_dir else default_cache()
    prepared = prepare(Path(keys.path), keys, tokenizer, cache, say)
    if isinstance(keys.validation, str):
        held_out = prepare(Path(keys.validation), keys, tokenizer, cache, say)
        train_rows, _ = split_rows(_keys(prepared), 0, keys.max_rows, config.run.seed)
        train, validation = Rows(prepared, train_rows), Rows(held_out, np.arange(len(held_out)))
    else:
        train_rows, held_rows = split_rows(_keys(prepared), keys.validation, keys.max_rows, config.run.seed)
        train, validation = Rows(prepared, train_rows), Rows(prepared, held_rows)
    if config.batch.global_size > len(train):
        raise DataError(
            "batch.global_size",
            value=config.batch.global_size,
            rule=f"is more than the {len(train)} training rows",
            cure=f"batch.global_size={len(train)} or less",
        )
    digest = hashlib.sha256()
    for rows in (train, validation):
        digest.update(rows.prepared.fingerprint.encode() + rows.indices.tobytes())
    ends = Template(tokenizer, keys.template, keys.alpaca_role, keys.train_on).end_ids()
    return Data(train, validation, digest.hexdigest()[:32], tuple(ends))


def describe(data: Data, config: TrainConfig) -> list[str]:
    """A short report for people: rows, lengths, what is learnt, what was left out, steps."""
    lengths = data.train.lengths
    learnt = data.train.label_tokens(np.arange(len(data.train)))
    prepared = data.train.prepared
    steps = total_steps(len(data.train), config.batch.global_size, config.batch.epochs, config.batch.max_steps)
    quantiles = " ".join(f"{q:.0f}" for q in np.quantile(lengths, (0, 0.5, 0.95, 1)))
    lines = [
        f"data: {len(data.train):,} rows to train on, {len(data.validation):,} held out, from {prepared.source}",
        f"tokens: {int(lengths.sum()):,}; a row min/median/95 %/max {quantiles}; {learnt:,} are learnt",
        f"steps: {steps:,} of {config.batch.global_size} examples",
    ]
    if prepared.dropped or prepared.truncated:
        lines.append(
            f"over data.max_length={config.data.max_length}: {prepared.dropped:,} rows left out, "
            f"{prepared.truncated:,} prompts cut on the left"
        )
    return lines


def _keys(prepared: Prepared) -> np.ndarray:
    return np.asarray(prepared.table.data.column("prompt_key").to_numpy())
