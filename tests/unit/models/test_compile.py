"""Compiled decoder layers give the gradients of eager ones, over tries of any shape, and can be taken back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.helpers.architectures import tiny
from trainer.data.batching.micro_batch import Tokens
from trainer.data.batching.packing import Packing
from trainer.data.batching.rank_split import Limits
from trainer.kernels.label_loss import LabelLoss
from trainer.kernels.trie_attention import KERNEL, register, trie_context
from trainer.models.compile import compile_layers


@pytest.mark.slow
def test_gradients_are_those_of_eager_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured by torch.compile but not translated: that would take a C++ compiler and minutes."""
    whole = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **keys: whole(self, backend="eager", **keys))
    torch.manual_seed(0)
    model: Any = tiny("llama", num_hidden_layers=1)
    register()
    model.set_attn_implementation(KERNEL)
    loss = LabelLoss(model)

    def gradients(lengths: list[int]) -> list[Tensor]:
        rows = [Tokens(np.arange(2, 2 + n, dtype=np.int32), np.arange(n) > 2) for n in lengths]
        rows.append(Tokens(np.asarray([2, 3, 9, 9], np.int32), np.ones(4, dtype=bool)))
        batch = Packing(True, Limits(None, 4096), 0).collate(rows, range(len(rows)))
        with trie_context(batch.paths):
            return list(torch.autograd.grad(loss(model, batch), list(model.parameters())))

    expected = [gradients(lengths) for lengths in ([9, 12], [20])]
    patch = compile_layers(model)
    assert patch is not None
    found = [gradients(lengths) for lengths in ([9, 12], [20])]
    for one, other in zip([g for each in found for g in each], [g for each in expected for g in each], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    patch.undo()
    assert all(torch.equal(a, b) for a, b in zip(gradients([9, 12]), expected[0], strict=True))
