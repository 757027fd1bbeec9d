"""Tensors in one buffer: bit-equal behind it, at aligned places; a micro-batch goes to its device in one copy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.shared_prefixes import rows_with_shared_prefixes
from trainer.data.batching.flat_tensors import flatten, unflatten
from trainer.data.batching.micro_batch import MicroBatch, Tokens, collate_padded, collate_trie

DTYPES = (torch.int64, torch.int32, torch.float32, torch.bfloat16, torch.uint8, torch.bool)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bits of any dtype, NaN among them; empty ones, scalars and transposed ones too."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.lists(st.integers(0, 5), max_size=3))
    size = math.prod(shape)
    if dtype is torch.bool:
        flat = torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size)), dtype=dtype)
    else:
        length = size * dtype.itemsize
        raw = draw(st.binary(min_size=length, max_size=length))
        flat = torch.tensor(list(raw), dtype=torch.uint8).view(dtype)
    tensor = flat.view(shape)
    return tensor.mT if tensor.dim() >= 2 and draw(st.booleans()) else tensor


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@settings(max_examples=200, deadline=None)
@given(st.lists(tensors(), max_size=8))
def test_tensors_come_back_bit_equal(given_tensors: list[Tensor]) -> None:
    buffer = flatten(given_tensors)
    found = unflatten(buffer, given_tensors)
    for one, other in zip(given_tensors, found, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert bits(one) == bits(other)
        assert other.numel() == 0 or (other.data_ptr() - buffer.data_ptr()) % 16 == 0


@settings(max_examples=50, deadline=None)
@given(rows_with_shared_prefixes(), st.booleans())
def test_a_micro_batch_travels_whole(rows: list[Tokens], as_trie: bool) -> None:
    """To the meta device, which holds shapes alone: nothing is left behind, and all is in one storage."""
    batch = collate_trie(rows, range(len(rows))) if as_trie else collate_padded(rows, range(len(rows)), 0)
    moved = batch.to(torch.device("meta"))
    assert [(t.shape, t.dtype) for t in moved.tensors()] == [(t.shape, t.dtype) for t in batch.tensors()]
    assert {t.device.type for t in every_tensor(moved)} == {"meta"}
    assert len({t.untyped_storage()._cdata for t in moved.tensors()}) == 1
    assert (moved.rows, moved.useful_tokens, moved.max_labels) == (batch.rows, batch.useful_tokens, batch.max_labels)


@settings(max_examples=50, deadline=None)
@given(rows_with_shared_prefixes())
def test_a_trie_is_the_same_behind_a_buffer(rows: list[Tokens]) -> None:
    batch = collate_trie(rows, range(len(rows)))
    again = batch.with_tensors(unflatten(flatten(batch.tensors()), batch.tensors()))
    assert all(map(torch.equal, every_tensor(batch), every_tensor(again)))
    assert batch.paths is not None
    assert again.paths is not None
    for order, other in zip(batch.paths.key_indices(3), again.paths.key_indices(3), strict=True):
        assert torch.equal(order, other)
    for bucket, copy in zip(batch.paths.buckets, again.paths.buckets, strict=True):
        assert torch.equal(bucket.mask(4), copy.mask(4))


@pytest.mark.parametrize("as_trie", [True, False])
def test_on_its_own_device_nothing_is_copied(as_trie: bool) -> None:
    rows = [Tokens(np.arange(n, dtype=np.int32), np.ones(n, dtype=bool)) for n in (3, 5)]
    batch = collate_trie(rows, range(2)) if as_trie else collate_padded(rows, range(2), 0)
    assert all(
        one is other for one, other in zip(batch.tensors(), batch.to(torch.device("cpu")).tensors(), strict=True)
    )


def every_tensor(batch: MicroBatch) -> list[Tensor]:
    """The tensors as the model's code reaches them, not as :meth:`MicroBatch.tensors` lists them."""
    found = [batch.input_ids, batch.attention_mask, batch.source, batch.target, batch.weight]
    if batch.paths is not None:
        assert batch.position_ids is not None
        order = batch.paths.query_order(2)
        found += [batch.position_ids, batch.paths.place, order.gather, order.inverse, order.padding]
        found += [t for b in batch.paths.buckets for t in (b.queries, b.keys, b.depths)]
    return found
