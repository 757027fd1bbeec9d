"""Count the floating-point operations that a model takes to train on tokens, forward and backward.

By the convention of the field (Kaplan et al., 2020, section 2.1; PaLM, Chowdhery et al., 2022, appendix B): a weight
costs 2 a token in the forward, 2 for the gradient of its input, and 2 for its own gradient where it is trained.
Attention costs 2 for each (query, key) pair and width of a head in the scores and as many in their product with the
values, and twice that in the backward; a pair that the causal mask or the sliding window hides costs nothing. What
gradient checkpointing computes twice is not counted: it is no progress.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from trainer.compat.deepspeed import whole_shape
from trainer.data.batching.micro_batch import MicroBatch
from trainer.methods.parameters import count_weights

# Keys of transformers' configs for the same two numbers.
EXPERTS_PER_TOKEN = ("num_experts_per_tok",)
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
FULL_ATTENTION = ("full_attention", "attention")
NOT_FOR_TEXT = {"vision_tower", "vision_model", "visual", "audio_tower", "multi_modal_projector"}


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """What a model costs, forward and backward.

    Attributes:
        per_token: of the layers between the embedding and the output layer, a token.
        per_label: of the output layer, a position that meets it.
        per_pair: of attention, a layer and (query, key) pair.
        layers: how many layers have which sliding window, in tokens; ``None`` is full attention.
    """

    per_token: float
    per_label: float
    per_pair: float
    layers: tuple[tuple[int | None, int], ...]

    def of_batches(self, batches: Sequence[MicroBatch]) -> float:
        """Count what a device computes for micro-batches on the host, padding included and shared prefixes once."""
        tokens = sum(batch.computed_tokens for batch in batches)
        labels = sum(len(batch.source) for batch in batches)
        pairs = sum(n * _batch_pairs(batch, window) for batch in batches for window, n in self.layers)
        return self.per_token * tokens + self.per_label * labels + self.per_pair * pairs

    def of_rows(self, lengths: np.ndarray, labels: int) -> float:
        """Count what rows would cost, each computed alone.

        Args:
            lengths: tokens a row, int64, shape (rows,).
            labels: label tokens in all of them.
        """
        pairs = sum(n * _causal_pairs(lengths, window) for window, n in self.layers)
        return self.per_token * int(lengths.sum()) + self.per_label * labels + self.per_pair * pairs


def _causal_pairs(lengths: np.ndarray, window: int | None) -> int:
    """Count the (query, key) pairs in rows of these lengths: a token sees itself and those before it in the window."""
    seen = lengths if window is None else np.minimum(lengths, window)
    return int((seen * (seen + 1) // 2 + (lengths - seen) * seen).sum())


def _batch_pairs(batch: MicroBatch, window: int | None) -> int:
    if batch.position_ids is None:
        rows, width = batch.input_ids.shape
        return rows * _causal_pairs(np.asarray([width]), window)
    keys = batch.position_ids.numpy() + 1  # a node sees its path from the root
    return int(keys.sum() if window is None else np.minimum(keys, window).sum())


def count_flops(model: Any) -> ModelFlops:
    """Count what a causal language model costs, by its weights and its config.

    Counted are weights of two dimensions or more: not norms and biases, not tables of embeddings (a look-up), and the
    weights of experts by the share of them that a token meets. The output layer counts a label position, also where its
    weight is the table of embeddings. Not counted are: the virtual tokens of prompt and prefix tuning, layers that mix
    tokens by other means than attention, and attention itself where the config does not say its heads and layers.

    Args:
        model: a Hugging Face model with its trainable parameters, wrapped by PEFT or not; under ZeRO-3 too.
    """
    text = model.config.get_text_config()
    head = {id(p) for p in model.get_output_embeddings().parameters()}
    tables = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    share = _expert_share(text)
    per_token = per_label = 0.0
    for name, parameter in model.named_parameters():
        parts = set(name.split("."))
        if len(whole_shape(parameter)) < 2 or parts & NOT_FOR_TEXT:
            continue
        operations = (6 if parameter.requires_grad else 4) * count_weights(parameter)
        if id(parameter) in head:
            per_label += operations
        elif id(parameter) not in tables:
            per_token += operations * (share if "experts" in parts else 1)
    return ModelFlops(per_token, per_label, *_attention(text))


def _expert_share(text: Any) -> float:
    """Return the share of a mixture's experts that a token is sent to; 1 where the config does not say."""
    chosen, experts = _first(text, EXPERTS_PER_TOKEN), _first(text, EXPERTS)
    return chosen / experts if chosen and experts else 1.0


def _attention(text: Any) -> tuple[float, tuple[tuple[int | None, int], ...]]:
    """Return the operations a pair and layer, and how many layers have which window."""
    heads, layers = _first(text, ("num_attention_heads",)), _first(text, ("num_hidden_layers",))
    width = _first(text, ("head_dim",)) or (_first(text, ("hidden_size",)) or 0) // (heads or 1)
    if not heads or not layers or not width:
        return 0.0, ()
    # Latent attention (DeepSeek) has keys of another width than values.
    key_width, value_width = _first(text, ("qk_head_dim",)) or width, _first(text, ("v_head_dim",)) or width
    window = _first(text, ("sliding_window",))
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    if kinds is None:
        slides = getattr(text, "use_sliding_window", True)
        found = Counter({window if slides else None: layers})
    else:
        found = Counter(window if kind == "sliding_attention" else None for kind in kinds if _is_attention(kind))
    return 6.0 * heads * (key_width + value_width), tuple(found.items())


def _is_attention(kind: str) -> bool:
    return kind in (*FULL_ATTENTION, "sliding_attention")


def _first(text: Any, names: Sequence[str]) -> int | None:
    """Return the first of some keys of a config that is set to a number."""
    values = (getattr(text, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)
