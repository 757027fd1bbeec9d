"""Collate examples into the token tensors of one device forward: padded rows side by side, or a trie.

A label is predicted from the token before it, so ``source`` names positions of hidden states and ``target`` the token
ids; the loss mask is in them already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trainer.data.batching.flat_tensors import flatten, unflatten
from trainer.data.batching.pieces import Pieces, row_pieces, trie_pieces
from trainer.data.batching.trie import build_trie
from trainer.data.batching.trie_paths import TriePaths, build_paths


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of one example.

    Attributes:
        ids: token ids, int32, shape (tokens,).
        loss_mask: which of them are in the loss, bool, shape (tokens,).
    """

    ids: np.ndarray
    loss_mask: np.ndarray


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The tensors of one device forward.

    Attributes:
        input_ids: int64, shape (rows, width); a trie is one row.
        attention_mask: int64, shape (rows, width), 1 on tokens and 0 on padding, on the right; of a trie all 1.
        source: int64, shape (labels,): the flattened position whose hidden state predicts each label.
        target: int64, shape (labels,): the label's token id.
        weight: float32, shape (labels,): how often the label counts in the loss.
        useful_tokens: the examples' own tokens, padding left out and shared prefixes counted in each.
        rows: indices of the examples in the training or held-out rows, for messages.
        max_labels: at least as many as the labels, and alike on all ranks: how often the output layer is called.
        position_ids: of a trie, int64, shape (1, width): depths; ``None`` in padded rows.
        noise_scale: float32, shape (rows, width): 1 / sqrt(tokens of the row), 0 on padding; of a token that several
            rows share the root mean square of theirs. ``None`` where it was not asked for.
        paths: the layout of its attention; ``None`` leaves padded rows to the model's own masks.
        buffer: page-locked memory that all tensors are views of, uint8, shape (bytes,); ``None`` unless pinned.
    """

    input_ids: Tensor
    attention_mask: Tensor
    source: Tensor
    target: Tensor
    weight: Tensor
    useful_tokens: int
    rows: tuple[int, ...]
    max_labels: int
    position_ids: Tensor | None = None
    noise_scale: Tensor | None = None
    paths: TriePaths | Pieces | None = None
    buffer: Tensor | None = None

    @property
    def computed_tokens(self) -> int:
        """Tokens that the device runs, padding included; an empty micro-batch's stand-in counts too."""
        return self.input_ids.numel()

    def tensors(self) -> list[Tensor]:
        """Return all tensors, in the order that :meth:`with_tensors` takes them."""
        own = [getattr(self, name) for name in self._names()]
        return own + ([] if self.paths is None else self.paths.tensors())

    def with_tensors(self, tensors: Sequence[Tensor]) -> MicroBatch:
        """Return the same micro-batch with other tensors in the places of its own."""
        names = self._names()
        own = dict(zip(names, tensors, strict=False))
        paths = None if self.paths is None else self.paths.with_tensors(tensors[len(names) :])
        return replace(self, **own, paths=paths, buffer=None)

    def _names(self) -> list[str]:
        optional = (name for name in ("position_ids", "noise_scale") if getattr(self, name) is not None)
        return ["input_ids", "attention_mask", "source", "target", "weight", *optional]

    def pin_memory(self) -> MicroBatch:
        """Return the same micro-batch with its tensors in one buffer of page-locked memory; needs CUDA."""
        tensors = self.tensors()
        buffer = flatten(tensors, pin_memory=True)
        return replace(self.with_tensors(unflatten(buffer, tensors)), buffer=buffer)

    def to(self, device: torch.device) -> MicroBatch:
        """Return the same micro-batch with its tensors on ``device``: views of one buffer that is copied in one go.

        The copy to a GPU is from page-locked memory and is not waited for. Where the tensors are on ``device``
        already, nothing is copied.
        """
        if self.input_ids.device == device:
            return self.with_tensors(self.tensors())  # its paths fill caches that must not outlive the forward
        tensors = self.tensors()
        buffer = flatten(tensors, pin_memory=device.type == "cuda") if self.buffer is None else self.buffer
        return self.with_tensors(unflatten(buffer.to(device, non_blocking=True), tensors))


def collate_padded(
    examples: Sequence[Tokens],
    rows: Sequence[int] | np.ndarray,
    pad_id: int,
    max_labels: int = 0,
    in_pieces: bool = False,
    with_noise: bool = False,
) -> MicroBatch:
    """Collate examples into rows, padded on the right to the longest.

    Without examples, a stand-in of one token and no label is returned: the forward runs the same collectives as on the
    other ranks and adds exactly zero.

    Args:
        examples: a label on the first token of one has nothing to be predicted from and is left out.
        rows: their indices.
        pad_id: fills the padding; masked, so any id gives the same result.
        max_labels: labels of the micro-batch that has most, of those that run at the same time on the ranks.
        in_pieces: each row is a piece of a varlen call, not under the model's mask.
        with_noise: ``noise_scale`` is wanted.
    """
    width = max((len(e.ids) for e in examples), default=1)
    ids = np.full((max(1, len(examples)), width), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    loss_mask = np.zeros(ids.shape, dtype=bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = example.ids
        mask[row, : len(example.ids)] = 1
        loss_mask[row, 1 : len(example.ids)] = example.loss_mask[1:]
    if not examples:
        mask[:] = 1
    target = np.flatnonzero(loss_mask)
    scale = (mask / np.sqrt(mask.sum(1, keepdims=True))).astype(np.float32) if with_noise else None
    return MicroBatch(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        source=torch.from_numpy(target - 1),
        target=torch.from_numpy(ids.reshape(-1)[target]),
        weight=torch.ones(len(target), dtype=torch.float32),
        useful_tokens=sum(len(e.ids) for e in examples),
        rows=tuple(int(r) for r in rows),
        max_labels=max(max_labels, len(target)),
        noise_scale=None if scale is None else torch.from_numpy(scale),
        paths=row_pieces(*ids.shape) if in_pieces else None,
    )


def collate_trie(
    examples: Sequence[Tokens],
    rows: Sequence[int] | np.ndarray,
    max_labels: int = 0,
    in_pieces: bool = False,
    with_noise: bool = False,
) -> MicroBatch:
    """Collate examples into one trie: each shared prefix once, with the loss and gradient of the separate rows.

    Args:
        examples: at least one, each of at least one token.
        rows: their indices.
        max_labels: as in :func:`collate_padded`.
        in_pieces: the layout of a varlen call, not of rows of queries in buckets.
        with_noise: ``noise_scale`` is wanted.
    """
    trie = build_trie([e.ids for e in examples], [e.loss_mask for e in examples], with_lengths=with_noise)
    scale = None if trie.inverse_lengths is None else np.sqrt(trie.inverse_lengths).astype(np.float32)
    target = np.flatnonzero(trie.weights)
    return MicroBatch(
        input_ids=torch.from_numpy(trie.ids)[None],
        attention_mask=torch.ones(1, len(trie.ids), dtype=torch.int64),
        source=torch.from_numpy(trie.parents[target]),
        target=torch.from_numpy(trie.ids[target]),
        weight=torch.from_numpy(trie.weights[target].astype(np.float32)),
        useful_tokens=sum(len(e.ids) for e in examples),
        rows=tuple(int(r) for r in rows),
        max_labels=max(max_labels, len(target)),
        position_ids=torch.from_numpy(trie.depths)[None],
        noise_scale=None if scale is None else torch.from_numpy(scale)[None],
        paths=trie_pieces(trie) if in_pieces else build_paths(trie),
    )
