"""Padded rows: the tensors of one forward."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.batching.micro_batch import MicroBatch, Tokens, collate_padded

Rows = list[dict[str, Any]]
rows_of_tokens = st.lists(
    st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=9), min_size=1, max_size=5
).map(lambda rows: [{"input_ids": [t for t, _ in row], "labels": [label for _, label in row]} for row in rows])


def padded(rows: Rows, which: Any, pad_id: int) -> MicroBatch:
    examples = [Tokens(np.asarray(r["input_ids"], np.int32), np.asarray(r["labels"], bool)) for r in rows]
    return collate_padded(examples, which, pad_id)


@settings(max_examples=80, deadline=None)
@given(rows_of_tokens, st.integers(0, 99))
def test_padded_tensors(rows: Rows, pad_id: int) -> None:
    batch = padded(rows, range(7, 7 + len(rows)), pad_id)
    width = max(len(r["input_ids"]) for r in rows)
    assert batch.input_ids.shape == batch.attention_mask.shape == (len(rows), width)
    for k, row in enumerate(rows):
        length = len(row["input_ids"])
        assert batch.input_ids[k].tolist() == row["input_ids"] + [pad_id] * (width - length)
        assert batch.attention_mask[k].tolist() == [1] * length + [0] * (width - length)
    # (row, position of the label, its token), a label on a first token left out
    loss_mask = [
        (k, i, row["input_ids"][i])
        for k, row in enumerate(rows)
        for i, label in enumerate(row["labels"])
        if label and i
    ]
    assert batch.source.tolist() == [k * width + i - 1 for k, i, _ in loss_mask]
    assert batch.target.tolist() == [token for _, _, token in loss_mask]
    assert batch.weight.tolist() == [1.0] * len(loss_mask)
    assert (batch.useful_tokens, batch.computed_tokens) == (sum(len(r["input_ids"]) for r in rows), len(rows) * width)
    assert batch.rows == tuple(range(7, 7 + len(rows)))
    assert [t.dtype for t in (batch.input_ids, batch.attention_mask, batch.source, batch.target)] == [torch.int64] * 4
    assert batch.to(torch.device("cpu")).input_ids.equal(batch.input_ids)


def test_the_stand_in_has_one_token_and_no_label() -> None:
    batch = padded([], [], pad_id=2)
    assert batch.input_ids.tolist() == [[2]]
    assert batch.attention_mask.tolist() == [[1]]
    assert batch.source.numel() == batch.target.numel() == batch.weight.numel() == batch.useful_tokens == 0
