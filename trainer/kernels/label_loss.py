"""Summed cross-entropy at label positions only, in chunks.

The rows of the hidden states that predict a label are picked before the vocabulary matrix, so no logits are computed
for prompt or padding. Few labels go through the model's own output layer in its own forward: whatever a model does
before and after that layer (soft-capping, scaling) stays as its authors wrote it. Many labels are cut into chunks that
the layer meets one after the other; so no tensor of all logits ever exists. (But under ZeRO-3 with a trained output
layer, whose weights DeepSpeed takes away between the calls.)
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.data.batching.micro_batch import MicroBatch

CHUNK_ELEMENTS = 1 << 24  # logits a chunk: 64 MiB in fp32, and a few such tensors live at a time


class LabelLoss:
    """Computes the loss of micro-batches on one causal language model.

    Args:
        model: a Hugging Face causal LM, wrapped by PEFT or not, before it is handed to DeepSpeed.
        chunk_elements: most logits that exist at a time; ``None``: ``CHUNK_ELEMENTS``.
    """

    def __init__(self, model: Any, chunk_elements: int | None = None) -> None:
        text = model.config.get_text_config()
        self._after = partial(after_head, text)
        self._labels_a_call = max(1, (chunk_elements or CHUNK_ELEMENTS) // int(text.vocab_size))
        self._is_checked = False
        self._picks: Tensor | None = None
        self._length = 0
        self._first = 0
        self._picked = torch.empty(0)
        self._head: nn.Module = model.get_output_embeddings()
        self._head.register_forward_pre_hook(self._pick)

    def _pick(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._picks is None:
            return None
        hidden = args[0][:, -self._length :]  # virtual tokens of prompt tuning stand before the rows
        # index_select, because the backward of advanced indexing is not deterministic on CPU
        self._picked = hidden.reshape(-1, hidden.shape[-1]).index_select(0, self._picks)
        return (self._picked[: self._first].unsqueeze(0), *args[1:])

    def __call__(self, forward: Any, batch: MicroBatch) -> Tensor:
        """The sum over labels of weight × cross-entropy.

        Args:
            forward: the model, or the DeepSpeed engine around it.
            batch: tensors on the model's device.

        Returns:
            float32 scalar. Without labels it is exactly zero but still connected to the parameters, so that its
            backward runs the same collectives as on the other ranks.
        """
        calls = self._calls(batch)
        # Every call sends at least one position through, if need be with weight zero: an empty matmul would leave the
        # graph, and under ZeRO-3 each call is a collective, as many on every rank.
        missing = (0, max(0, calls - batch.source.numel()))
        source, target, weight = (nn.functional.pad(t, missing) for t in (batch.source, batch.target, batch.weight))
        sizes = [len(piece) for piece in torch.tensor_split(source, calls)]
        self._picks, self._first, self._length = source, sizes[0], batch.input_ids.shape[1]
        try:
            logits = forward(**_inputs(batch), use_cache=False).logits.flatten(0, 1)
        finally:
            self._picks = None
        picked, self._picked = self._picked, torch.empty(0)
        if calls > 1 and not self._is_checked:
            self._is_checked = True
            if not self._agrees(picked[:1], logits[:1]):
                self._labels_a_call = sys.maxsize
                return self(forward, batch)
        pieces = list(zip(*(t.split(sizes) for t in (picked, target, weight)), strict=True))
        total = _cross_entropy(logits, *pieces[0][1:])
        if self._is_trained():
            rest = [checkpoint(self._chunk, *piece, use_reentrant=False) for piece in pieces[1:]]
        else:
            rest = [_FrozenHead.apply(self._chunk, *piece) for piece in pieces[1:]]
        return sum(rest, total)

    def logits(self, forward: Any, batch: MicroBatch) -> Tensor:
        """Logits at the label positions, (labels, vocabulary), all at once: for few labels.

        Without labels one row that means nothing is given: under ZeRO-3 the forward is a collective.
        """
        self._picks = batch.source if len(batch.source) else batch.source.new_zeros(1)
        self._first, self._length = len(self._picks), batch.input_ids.shape[1]
        try:
            found: Tensor = forward(**_inputs(batch), use_cache=False).logits
        finally:
            self._picks, self._picked = None, torch.empty(0)
        return found.flatten(0, 1)

    def _calls(self, batch: MicroBatch) -> int:
        """How often the output layer is called: as often on every rank."""
        if self._is_trained() and any(hasattr(p, "ds_id") for p in self._head.parameters()):
            return 1
        return math.ceil(max(batch.max_labels, 1) / self._labels_a_call)

    def _is_trained(self) -> bool:
        return any(p.requires_grad for p in self._head.parameters())

    def _chunk(self, hidden: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return _cross_entropy(self._after(self._head(hidden)), target, weight)

    def _agrees(self, hidden: Tensor, expected: Tensor) -> bool:
        """Whether the output layer, called by us, gives what the model makes of the same hidden state."""
        with torch.no_grad():
            found = self._after(self._head(hidden)).float()
        if torch.allclose(found, expected.float(), rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
            return True
        warnings.warn("this model changes its logits in a way of its own: they are computed all at once", stacklevel=2)
        return False


class _FrozenHead(torch.autograd.Function):
    """The loss of a chunk, with the gradient of its hidden states taken at once, so that its logits can go."""

    @staticmethod
    def forward(ctx: Any, chunk: Callable[..., Tensor], hidden: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        if not ctx.needs_input_grad[1]:
            return chunk(hidden, target, weight)
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            loss = chunk(leaf, target, weight)
            (gradient,) = torch.autograd.grad(loss, leaf)
        ctx.save_for_backward(gradient)
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return None, gradient * outer[0], None, None


def after_head(config: Any, logits: Tensor) -> Tensor:
    """What models of transformers do to their logits after the output layer, by the keys of their configs: Cohere
    multiplies, Granite divides, Gemma 2 and 3 cap softly."""
    if getattr(config, "logit_scale", None) is not None:
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None) is not None:
        logits = logits / config.logits_scaling
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


def _cross_entropy(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    losses = nn.functional.cross_entropy(logits.float(), target, reduction="none")
    return torch.dot(losses, weight)


def _inputs(batch: MicroBatch) -> dict[str, Tensor]:
    if batch.paths is None:
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    # A mask of four dimensions is handed on as it is: transformers need not make one, which a trie would not look at.
    unused = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device)
    assert batch.position_ids is not None
    return {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "attention_mask": unused}
