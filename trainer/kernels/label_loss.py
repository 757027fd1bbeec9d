"""Compute the summed cross-entropy of the tokens in the loss, in chunks: no logits of prompt or padding.

The rows of the hidden states that predict a label are selected before the vocabulary matrix, so logits are computed at
label positions only. Few labels go through the model's own output layer in its own forward: whatever a model does
before and after that layer (soft-capping, scaling) stays as its authors wrote it. Many labels are cut into chunks that
the layer meets one after the other; so no tensor of all logits ever exists. (Not so under ZeRO-3 with a trainable
output layer: DeepSpeed partitions its weights again between the calls.)
"""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.compat.deepspeed import is_partitioned
from trainer.data.batching.micro_batch import MicroBatch
from trainer.kernels.trie_attention import trie_mask

CHUNK_ELEMENTS = 1 << 24  # logits a chunk: 64 MiB in fp32, and a few such tensors live at a time
# On CUDA 512 MiB: each chunk reads the whole vocabulary matrix again, a gigabyte in a model of 8B.
CUDA_CHUNK_ELEMENTS = 1 << 27


@dataclass(slots=True)
class _HeadRequest:
    """What the output layer's hook is to select in one forward, and what it selected.

    Attributes:
        positions: label positions among the flattened rows of tokens, int64, shape (labels,).
        first: how many of them the output layer gets in this forward.
        rows: that it gets them in.
        length: tokens a row.
        hidden: the hidden states at all positions, (labels, width), once the hook has run.
    """

    positions: Tensor
    first: int
    rows: int
    length: int
    hidden: Tensor | None = None

    def select(self, hidden: Tensor) -> Tensor:
        """Keep the hidden states at the positions and return the first of them, (rows, first / rows, width).

        Args:
            hidden: (rows, tokens, width), after the virtual tokens of prompt tuning.
        """
        own = hidden[:, -self.length :]
        # index_select, because the backward of advanced indexing is not deterministic on CPU
        self.hidden = own.reshape(-1, own.shape[-1]).index_select(0, self.positions)
        return self.hidden[: self.first].unflatten(0, (self.rows, -1))


class LabelLoss:
    """Computes the loss of micro-batches on one causal language model.

    Args:
        model: a Hugging Face causal LM, wrapped by PEFT or not, before it is handed to DeepSpeed.
        chunk_elements: most logits that exist at a time; ``None``: by the device, ``CHUNK_ELEMENTS``
            or ``CUDA_CHUNK_ELEMENTS``.
    """

    def __init__(self, model: Any, chunk_elements: int | None = None) -> None:
        text = model.config.get_text_config()
        self._scale_logits = partial(scale_logits, text)
        self._vocab_size = int(text.vocab_size)
        self._chunk_elements = chunk_elements
        self._is_verified = False
        self._request: _HeadRequest | None = None
        self._head: nn.Module = model.get_output_embeddings()
        self._head.register_forward_pre_hook(self._select_labels)

    def _select_labels(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Hand the output layer label positions alone; a forward that requested none is left as it is."""
        return None if self._request is None else (self._request.select(args[0]), *args[1:])

    @contextlib.contextmanager
    def _requesting(self, positions: Tensor, first: int, rows: int, batch: MicroBatch) -> Iterator[_HeadRequest]:
        """Let the hook select these positions in the one forward inside. Whatever else meets the output layer, a chunk
        or its recomputation in the backward, finds no request and passes as it is."""
        assert self._request is None, "one forward at a time"
        self._request = request = _HeadRequest(positions, first, rows, batch.input_ids.shape[1])
        try:
            yield request
        finally:
            self._request = None

    def __call__(self, forward: Any, batch: MicroBatch, trials: int | None = None) -> Tensor:
        """Compute the sum over labels of weight × cross-entropy.

        Args:
            forward: the model, or the DeepSpeed engine around it.
            batch: tensors on the model's device.
            trials: how many times the forward has the micro-batch, its rows once more for each trial.

        Returns:
            float32 scalar; with ``trials`` the sum of each, (trials,). Without labels it is exactly zero but still
            connected to the parameters, so that its backward runs the same collectives as on the other ranks.
        """
        count = trials or 1
        calls = self._count_head_calls(batch, count)
        # Every call sends at least one position through, if need be with weight zero: an empty matmul would leave the
        # graph, and under ZeRO-3 each call is a collective, as many on every rank.
        missing = (0, max(0, calls - batch.source.numel()))
        source, target, weight = (nn.functional.pad(t, missing) for t in (batch.source, batch.target, batch.weight))
        sizes = [len(chunk) for chunk in torch.tensor_split(source, calls)]
        positions = _repeat_chunks(source, sizes, count, batch.input_ids.numel())
        with self._requesting(positions, count * sizes[0], count, batch) as request:
            logits = forward(**_model_inputs(batch, count), use_cache=False).logits.flatten(0, 1)
        hidden = request.hidden
        assert hidden is not None, "the forward did not run the output layer"
        if calls > 1 and not self._is_verified:
            self._is_verified = True
            firsts = slice(0, count * sizes[0], sizes[0])  # one of each trial
            if not self._matches_model(hidden[firsts], logits[firsts]):
                self._chunk_elements = sys.maxsize
                return self(forward, batch, trials)
        per_chunk = hidden.split([count * size for size in sizes]), target.split(sizes), weight.split(sizes)
        chunks = list(zip(*per_chunk, strict=True))
        total = _cross_entropy(logits, *chunks[0][1:], trials)
        rest = [self._later_chunk(*chunk, trials) for chunk in chunks[1:]]
        return sum(rest, total)

    def _later_chunk(self, hidden: Tensor, target: Tensor, weight: Tensor, trials: int | None) -> Tensor:
        """Return the loss of a chunk that the output layer meets after the model's own forward."""
        hidden = hidden if trials is None else hidden.unflatten(0, (trials, -1))
        if self._is_head_trainable():
            loss: Tensor = checkpoint(self._chunk_loss, hidden, target, weight, trials, use_reentrant=False)
        else:
            loss = _FrozenHead.apply(self._chunk_loss, hidden, target, weight, trials)
        return loss

    def logits(self, forward: Any, batch: MicroBatch) -> Tensor:
        """Return the logits at the label positions, (labels, vocabulary), all at once: for few labels.

        Without labels one row that means nothing is given: under ZeRO-3 the forward is a collective.
        """
        positions = batch.source if len(batch.source) else batch.source.new_zeros(1)
        with self._requesting(positions, len(positions), 1, batch):
            logits: Tensor = forward(**_model_inputs(batch, 1), use_cache=False).logits
        return logits.flatten(0, 1)

    def _count_head_calls(self, batch: MicroBatch, trials: int) -> int:
        """Return how often the output layer is called: as often on every rank."""
        if self._is_head_trainable() and any(map(is_partitioned, self._head.parameters())):
            return 1
        by_device = CUDA_CHUNK_ELEMENTS if batch.source.is_cuda else CHUNK_ELEMENTS
        labels_per_call = max(1, (self._chunk_elements or by_device) // (self._vocab_size * trials))
        return math.ceil(max(batch.max_labels, 1) / labels_per_call)

    def _is_head_trainable(self) -> bool:
        return any(p.requires_grad for p in self._head.parameters())

    def _chunk_loss(self, hidden: Tensor, target: Tensor, weight: Tensor, trials: int | None) -> Tensor:
        return _cross_entropy(self._scale_logits(self._head(hidden)).flatten(0, -2), target, weight, trials)

    def _matches_model(self, hidden: Tensor, expected: Tensor) -> bool:
        """Return whether the output layer, called by us, gives what the model makes of the same hidden state."""
        with torch.no_grad():
            found, expected = self._scale_logits(self._head(hidden)).float(), expected.detach().float()
        if torch.allclose(found, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
            return True
        warnings.warn("this model changes its logits in a way of its own: they are computed all at once", stacklevel=2)
        return False


class _FrozenHead(torch.autograd.Function):
    """Computes the loss of a chunk and, at once, the gradient of its hidden states, so that its logits can go."""

    @staticmethod
    def forward(
        ctx: Any, chunk_loss: Callable[..., Tensor], hidden: Tensor, target: Tensor, weight: Tensor, trials: int | None
    ) -> Tensor:
        if not ctx.needs_input_grad[1]:
            return chunk_loss(hidden, target, weight, trials)
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            loss = chunk_loss(leaf, target, weight, trials)
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)  # each trial's loss has its own hidden states
        ctx.save_for_backward(gradient)
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        scale = grad_outputs[0] if grad_outputs[0].dim() == 0 else grad_outputs[0][:, None, None]
        return None, (gradient * scale).to(gradient.dtype), None, None, None


def scale_logits(config: Any, logits: Tensor) -> Tensor:
    """Scale and soft-cap logits as models of transformers do after the output layer, by the keys of their configs:
    Cohere multiplies, Granite divides, Gemma 2 and 3 cap softly."""
    if getattr(config, "logit_scale", None) is not None:
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None) is not None:
        logits = logits / config.logits_scaling
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


def _cross_entropy(logits: Tensor, target: Tensor, weight: Tensor, trials: int | None) -> Tensor:
    if trials is None:
        return torch.dot(nn.functional.cross_entropy(logits.float(), target, reduction="none"), weight)
    losses = nn.functional.cross_entropy(logits.float(), target.repeat(trials), reduction="none")
    return (losses.view(trials, -1) * weight).sum(1)


def _repeat_chunks(source: Tensor, sizes: list[int], trials: int, tokens: int) -> Tensor:
    """Return the positions of all trials' labels, chunk by chunk, so that each chunk has as many labels of each trial.

    Args:
        source: positions among the ``tokens`` of one trial, int64, (labels,).
        sizes: labels of one trial in each chunk.
        trials: whose tokens stand one after another.
        tokens: of one trial.
    """
    if trials == 1:
        return source
    begins = torch.arange(0, trials * tokens, tokens, device=source.device)
    return torch.cat([(begins[:, None] + chunk).flatten() for chunk in source.split(sizes)])


def _model_inputs(batch: MicroBatch, trials: int) -> dict[str, Tensor]:
    inputs = {"input_ids": batch.input_ids}
    if batch.paths is None:
        inputs["attention_mask"] = batch.attention_mask
    elif batch.position_ids is not None:
        inputs["position_ids"] = batch.position_ids
    if trials > 1:
        inputs = {name: tensor.repeat(trials, 1) for name, tensor in inputs.items()}
    return inputs if batch.paths is None else inputs | {"attention_mask": trie_mask(batch.input_ids.device)}
