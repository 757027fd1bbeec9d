"""Summed cross-entropy at label positions only.

The rows of the hidden states that predict a label are picked before the vocabulary matrix, so no logits are computed
for prompt or padding. The picking is a hook on the model's own output layer: whatever a model does before and after
that layer (soft-capping, scaling) stays as its authors wrote it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainer.data.micro import MicroBatch


class LabelLoss:
    """Computes the loss of micro-batches on one causal language model.

    Args:
        model: a Hugging Face causal LM, wrapped by PEFT or not, before it is handed to DeepSpeed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._source: Tensor | None = None
        head = model.get_output_embeddings()
        head.register_forward_pre_hook(self._pick)

    def _pick(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._source is None:
            return None
        hidden = args[0]
        # index_select, because the backward of advanced indexing is not deterministic on CPU
        picked = hidden.reshape(-1, hidden.shape[-1]).index_select(0, self._source)
        return (picked.unsqueeze(0), *args[1:])

    def __call__(self, forward: Any, batch: MicroBatch) -> Tensor:
        """The sum over labels of weight × cross-entropy.

        Args:
            forward: the model, or the DeepSpeed engine around it.
            batch: tensors on the model's device.

        Returns:
            float32 scalar. Without labels it is exactly zero but still connected to the parameters, so that its
            backward runs the same collectives as on the other ranks.
        """
        # Without labels one position is still sent through, times zero: an empty matmul would leave the graph.
        stand_in = batch.source.numel() == 0
        self._source = batch.source.new_zeros(1) if stand_in else batch.source
        try:
            output = forward(**_inputs(batch), use_cache=False)
        finally:
            self._source = None
        logits = output.logits.float().flatten(0, 1)
        if stand_in:
            return logits.sum() * 0.0
        losses = nn.functional.cross_entropy(logits, batch.target, reduction="none")
        return torch.dot(losses, batch.weight)


def _inputs(batch: MicroBatch) -> dict[str, Tensor]:
    if batch.paths is None:
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    # A mask of four dimensions is handed on as it is: transformers need not make one, which a trie would not look at.
    unused = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device)
    assert batch.position_ids is not None
    return {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "attention_mask": unused}
