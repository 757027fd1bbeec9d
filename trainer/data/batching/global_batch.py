"""Choose the examples of each optimizer step: a seeded shuffle an epoch, cut into global batches.

A pure function of seed and step, whatever the world size: there is no sampler state to save, and a resumed or resized
run sees the same examples.
"""

from __future__ import annotations

import math

import numpy as np


def total_steps(rows: int, global_size: int, epochs: float, max_steps: int | None) -> int:
    """Count the optimizer steps of a run: enough for ``epochs`` passes over ``rows``, at most ``max_steps``, at least
    one."""
    steps = max(1, math.ceil(epochs * rows / global_size - 1e-9))
    return min(steps, max_steps) if max_steps is not None else steps


def ends_epoch(step: int, rows: int, global_size: int) -> bool:
    """Return whether step ``step`` (from 0) draws the last row of an epoch."""
    return (step + 1) * global_size // rows > step * global_size // rows


def global_batch(seed: int, step: int, rows: int, global_size: int) -> np.ndarray:
    """Return the rows of one global batch.

    The stream of epochs, each shuffled in its own order, is cut into batches of ``global_size``; a batch may reach over
    the end of an epoch, so each step has exactly ``global_size`` examples.

    Args:
        seed: ``run.seed``.
        step: from 0.
        rows: training rows.
        global_size: examples a step, at most ``rows``.

    Returns:
        int64 array of shape (global_size,), values in [0, rows).
    """
    positions = np.arange(step * global_size, (step + 1) * global_size, dtype=np.int64)
    epochs, offsets = np.divmod(positions, rows)
    out = np.empty(global_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        out[here] = permute(offsets[here], rows, seed, int(epoch))
    return out


def permute(indices: np.ndarray, rows: int, seed: int, epoch: int) -> np.ndarray:
    """Map indices through the epoch's shuffle, a keyed bijection of [0, rows): O(len(indices)) time and memory, no
    table.

    A Feistel network (Luby & Rackoff, 1988) of six rounds permutes the next power of four; a value that falls outside
    [0, rows) is sent through again until it falls inside (cycle walking, Black & Rogaway, 2002).
    """
    half = max(1, ((rows - 1).bit_length() + 1) // 2)
    round_keys = np.random.SeedSequence([seed, 1, epoch]).generate_state(6, np.uint64)
    values = indices.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        values[outside] = _feistel(values[outside], half, round_keys)
        outside = values >= np.uint64(rows)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half: int, round_keys: np.ndarray) -> np.ndarray:
    low = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    left, right = values >> shift, values & low
    for round_key in round_keys:
        left, right = right, left ^ (_splitmix64(right ^ round_key) & low)
    return (left << shift) | right


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """Hash 64-bit words by the finaliser of SplitMix64 (Steele et al., 2014); arithmetic is modulo 2^64 by intent."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
