"""Add noise to the token embeddings of a forward in training (NEFTune: Jain et al., 2023)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trainer.data.batching.micro_batch import MicroBatch
from trainer.errors import ConfigError

OF_NOISE = 0x4E4546  # parts the random numbers of the noise from those of dropout, which has the same seed


class EmbeddingNoise:
    """Noise on what a model's embedding layer gives: uniform, at most alpha / sqrt(length · width) in a row of so many
    tokens; a token that several rows share has the root mean square of theirs. None outside :meth:`of`.

    Args:
        model: with its adapters, before DeepSpeed has it.
        alpha: of the paper.

    Raises:
        ConfigError: the model does not say which layer embeds its tokens.
    """

    def __init__(self, model: Any, alpha: float) -> None:
        try:
            layer: nn.Module = model.get_input_embeddings()
        except (AttributeError, NotImplementedError) as error:
            raise ConfigError(
                "model.neftune_alpha",
                value=alpha,
                reason="needs the layer that embeds tokens, and this model does not name it",
                hint="model.neftune_alpha=null",
            ) from error
        self._alpha = alpha
        self._of: tuple[Tensor, int] | None = None
        layer.register_forward_hook(self._add)

    @contextlib.contextmanager
    def of(self, batch: MicroBatch, seed: int) -> Iterator[None]:
        """Let the forward inside have noise; with one seed it is the same each time.

        Args:
            batch: on the model's device, with ``noise_scale``.
            seed: of the micro-batch.
        """
        assert batch.noise_scale is not None, "Packing.with_noise is set where there is noise"
        self._of = batch.noise_scale, seed ^ OF_NOISE
        try:
            yield
        finally:
            self._of = None

    def _add(self, _: nn.Module, __: Any, embedded: Tensor) -> Tensor | None:
        """Add noise to ``embedded``, (rows, tokens, width)."""
        if self._of is None:
            return None
        scale, seed = self._of
        generator = torch.Generator(embedded.device).manual_seed(seed)
        # drawn in fp32, so that it is the same in every dtype
        noise = torch.empty(embedded.shape, dtype=torch.float32, device=embedded.device)
        noise.uniform_(-1, 1, generator=generator)
        noise *= (self._alpha / math.sqrt(embedded.shape[-1])) * scale[..., None]
        return embedded + noise.to(embedded.dtype)
