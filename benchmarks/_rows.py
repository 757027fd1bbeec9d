"""The rows that afina trains on, in the order in which it draws them, for the peers that it is measured beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import TrainConfig, load
from trainer.data.batching.global_batch import global_batch
from trainer.data.batching.micro_batch import Tokens
from trainer.data.load import load_data
from trainer.data.run_data import Data
from trainer.models.embedded import resolve
from trainer.models.loading import load_tokenizer


def prepare_rows(overrides: list[str]) -> tuple[TrainConfig, Any, Data]:
    """Return a run's configuration, tokenizer and prepared rows."""
    config = load(overrides)
    tokenizer = load_tokenizer(resolve(config.model.name_or_path, config.model.revision), config.model)
    return config, tokenizer, load_data(config, tokenizer)


def rows_in_training_order(config: TrainConfig, data: Data, steps: int) -> list[Tokens]:
    """Return the examples of the first ``steps`` global batches, one batch after the other."""
    size = config.batch.global_size
    batches = [global_batch(config.run.seed, step, len(data.train), size) for step in range(steps)]
    return data.train.tokens(np.concatenate(batches))


def save_rows(path: Path, rows: list[Tokens]) -> None:
    """Write token ids and loss masks for ``_peer.load_rows``."""
    np.savez(
        path,
        ids=np.concatenate([row.ids for row in rows]),
        loss_mask=np.concatenate([row.loss_mask for row in rows]),
        lengths=np.asarray([len(row.ids) for row in rows]),
    )
