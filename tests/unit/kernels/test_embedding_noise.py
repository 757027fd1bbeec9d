"""NEFTune's noise beside transformers' own hook, and what it depends on."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.integrations.neftune import neftune_post_forward_hook

from trainer.data.batching.micro_batch import MicroBatch, Tokens
from trainer.data.batching.packing import Packing
from trainer.data.batching.rank_split import Limits
from trainer.errors import ConfigError
from trainer.kernels.embedding_noise import EmbeddingNoise

WIDTH, ALPHA = 64, 5.0


def batch_of(*rows: list[int], uses_trie: bool = False) -> MicroBatch:
    examples = [Tokens(np.asarray(row, np.int32), np.ones(len(row), bool)) for row in rows]
    return Packing(uses_trie, Limits(None, 4096), 0, with_noise=True).collate(examples, range(len(rows)))


def embedding() -> tuple[nn.Embedding, EmbeddingNoise]:
    torch.manual_seed(0)
    layer = nn.Embedding(50, WIDTH)
    return layer, EmbeddingNoise(SimpleNamespace(get_input_embeddings=lambda: layer), ALPHA)


def noise_in(layer: nn.Embedding, noise: EmbeddingNoise, batch: MicroBatch, seed: int = 7) -> torch.Tensor:
    with torch.no_grad():
        plain = layer(batch.input_ids)
        with noise.of(batch, seed):
            return layer(batch.input_ids) - plain


def test_its_size_is_that_of_transformers() -> None:
    """Of rows of one length, which is all that theirs looks at; theirs has no seed, so moments are compared."""
    rows = [[(i + k) % 49 + 1 for i in range(100)] for k in range(20)]
    layer, noise = embedding()
    batch = batch_of(*rows)
    ours = noise_in(layer, noise, batch)
    stock: Any = nn.Embedding(50, WIDTH)
    stock.neftune_noise_alpha = ALPHA
    plain = stock(batch.input_ids)
    stock.register_forward_hook(neftune_post_forward_hook)
    theirs = (stock(batch.input_ids) - plain).detach()
    bound = ALPHA / math.sqrt(100 * WIDTH)
    for found in (ours, theirs):
        assert found.abs().max() <= bound * (1 + 1e-4)
        assert float(found.std()) == pytest.approx(bound / math.sqrt(3), rel=0.01)
        assert float(found.mean()) == pytest.approx(0, abs=bound / 100)
        assert float(found[..., :-1].flatten().dot(found[..., 1:].flatten())) / found.numel() < bound**2 / 100


def test_each_row_has_the_noise_of_its_own_length_and_padding_none() -> None:
    layer, noise = embedding()
    found = noise_in(layer, noise, batch_of([1] * 400, [2] * 25))
    for row, length in ((0, 400), (1, 25)):
        bound = ALPHA / math.sqrt(length * WIDTH)
        assert found[row, :length].abs().max() == pytest.approx(bound, rel=0.01)
    assert not found[1, 25:].any()


def test_it_is_of_the_seed_and_not_of_the_dropout_and_ends_with_the_block() -> None:
    layer, noise = embedding()
    batch = batch_of(list(range(1, 20)))
    first = noise_in(layer, noise, batch)
    torch.manual_seed(3)
    assert torch.equal(noise_in(layer, noise, batch), first)
    assert torch.initial_seed() == 3
    assert not torch.equal(noise_in(layer, noise, batch, seed=8), first)
    assert torch.equal(layer(batch.input_ids), layer.weight[batch.input_ids]), "none outside, in training mode too"
    torch.manual_seed(7)
    drawn = torch.empty(1, 19, WIDTH).uniform_(-1, 1)
    assert abs(float(torch.corrcoef(torch.stack([drawn.flatten(), first.flatten()]))[0, 1])) < 0.1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=6))
def test_a_shared_token_has_the_mean_energy_of_its_rows(rows: list[list[int]]) -> None:
    """So the energy of all rows together is that of separate rows: alpha² / 3 each, whatever they share."""
    batch = batch_of(*rows, uses_trie=True)
    assert batch.noise_scale is not None
    assert batch.position_ids is not None
    paths: dict[tuple[int, ...], int] = {}
    path: tuple[int, ...] = ()
    for node, (token, depth) in enumerate(zip(batch.input_ids[0].tolist(), batch.position_ids[0].tolist())):
        path = (*path[:depth], token)
        paths[path] = node
    energy = batch.noise_scale[0].double().square()
    for prefix, node in paths.items():
        through = [1 / len(row) for row in rows if tuple(row[: len(prefix)]) == prefix]
        assert float(energy[node]) == pytest.approx(sum(through) / len(through), rel=1e-5)
    whole = sum(float(energy[paths[tuple(row[:end])]]) for row in rows for end in range(1, len(row) + 1))
    assert whole == pytest.approx(len(rows), rel=1e-5)


def test_a_model_that_does_not_name_its_embeddings_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.neftune_alpha"):
        EmbeddingNoise(SimpleNamespace(), ALPHA)
