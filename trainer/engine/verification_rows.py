"""Pick the real rows that packing and kernels are verified on at start-up."""

from __future__ import annotations

from typing import Any

import numpy as np

from trainer.config.schema import TrainConfig
from trainer.data.batching.global_batch import global_batch
from trainer.data.batching.micro_batch import Tokens
from trainer.data.batching.trie import sort_by_tokens
from trainer.data.run_data import Data
from trainer.methods.text_part import text_modules

KEPT = 16  # tokens before and after the fork of the two rows that are tried
BEHIND_WINDOW = 64  # tokens behind the sliding window, in the row that tries it
OTHER_TAIL = 16  # of these, how many differ in that row's twin


def smallest_window(model: Any) -> int | None:
    """Return the tokens of the narrowest sliding window of its layers, if any has one."""
    config = model.config.get_text_config()
    windows = [getattr(module, "sliding_window", None) for _, module in text_modules(model)]
    kinds = getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    windows.append(getattr(config, "sliding_window", None) if slides else None)
    return min((w for w in windows if isinstance(w, int)), default=None)


def verification_rows(config: TrainConfig, data: Data, window: int | None) -> list[list[Tokens]]:
    """Pick real rows of the first step, in groups that are verified one after the other; short: each takes a second.

    First the two rows that share most, cut around their fork. They come again with every token in the loss, one of them
    cut short: so there are labels at forks, labels that count more than once, and an end inside another row, whatever
    the data holds. Then, if any training row is longer than the sliding window, such a row, and one that leaves it
    shortly before its end.
    """
    chosen = global_batch(config.run.seed, 0, len(data.train), config.batch.global_size)
    rows = data.train.tokens(chosen[:64])
    order, begins = sort_by_tokens([r.ids for r in rows])
    at = int(begins.argmax())
    pair = order[max(0, at - 1) : at + 1].tolist()
    start = max(0, int(begins[at]) - KEPT)
    picked = [Tokens(rows[i].ids[start : start + 2 * KEPT], rows[i].loss_mask[start : start + 2 * KEPT]) for i in pair]
    first, second = picked[0].ids, picked[-1].ids
    groups = [[*picked, _all_in_loss(first), _all_in_loss(second[: len(second) * 2 // 3 + 1])]]
    longer = np.flatnonzero(data.train.lengths > (window or np.inf))
    if window is not None and len(longer):
        ids = data.train.tokens(longer[:1])[0].ids[: window + BEHIND_WINDOW]
        twin = np.concatenate([ids[:-OTHER_TAIL], ids[-OTHER_TAIL:][::-1]])
        groups.append([_all_in_loss(ids), _all_in_loss(twin)])
    return groups


def _all_in_loss(ids: np.ndarray) -> Tokens:
    return Tokens(ids, np.ones(len(ids), dtype=bool))
