"""Count the floating-point operations that a model takes to train on tokens, forward and backward.

By the convention of the field (Kaplan et al., 2020, section 2.1; PaLM, Chowdhery et al., 2022, appendix B): a weight
costs 2 a token in the forward, 2 for the gradient of its input, and 2 for its own gradient where it is trained.
Attention costs 2 for each (query, key) pair and width of a head in the scores and as many in their product with the
values, and twice that in the backward; a pair that the causal mask or the sliding window hides costs nothing. What
gradient checkpointing computes twice is not counted: it is no progress.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from trainer.compat.deepspeed import whole_shape
from trainer.data.batching.micro_batch import MicroBatch
from trainer.methods.parameters import count_weights
from trainer.methods.text_part import text_parameters

# Keys of transformers' configs for the same two numbers.
EXPERTS_PER_TOKEN = ("num_experts_per_tok",)
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
FULL_ATTENTION = ("full_attention", "attention")


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """What a model costs, forward and backward.

    Attributes:
        per_token: of the layers between the embedding and the output layer, a token.
        per_label: of the output layer, a position that meets it.
        per_pair: of attention, a layer and (query, key) pair.
        layers: how many layers have which sliding window, in tokens; ``None`` is full attention. A layer with other
            heads than the first counts by its cost.
    """

    per_token: float
    per_label: float
    per_pair: float
    layers: tuple[tuple[int | None, float], ...]

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
    for name, parameter in text_parameters(model).items():
        if len(whole_shape(parameter)) < 2:
            continue
        operations = (6 if parameter.requires_grad else 4) * count_weights(parameter)
        if id(parameter) in head:
            per_label += operations
        elif id(parameter) not in tables:
            per_token += operations * (share if "experts" in name.split(".") else 1)
    return ModelFlops(per_token, per_label, *_attention(text))


def _expert_share(text: Any) -> float:
    """Return the share of a mixture's experts that a token is sent to; 1 where the config does not say."""
    chosen, experts = _first(text, EXPERTS_PER_TOKEN), _first(text, EXPERTS)
    return chosen / experts if chosen and experts else 1.0


def layer_configs(text: Any) -> list[Any]:
    """Return the config of each layer: the model's own, but where its layers are unlike (Gemma 4) and have theirs."""
    if getattr(text, "is_heterogeneous", False):
        return list(text.per_layer_config)
    return [text] * (_first(text, ("num_hidden_layers",)) or 0)


def _attention(text: Any) -> tuple[float, tuple[tuple[int | None, float], ...]]:
    """Return the operations a pair in the first layer, and how many layers like it have which window."""
    layers = layer_configs(text)
    costs = [_operations_a_pair(layer) for layer in layers]
    if not all(costs) or not costs:
        return 0.0, ()
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    if kinds is None:
        kinds = ["sliding_attention" if getattr(text, "use_sliding_window", True) else "full_attention"] * len(layers)
    found: dict[int | None, float] = {}
    for layer, cost, kind in zip(layers, costs, kinds, strict=False):
        if _is_attention(kind):
            window = _first(layer, ("sliding_window",)) if kind == "sliding_attention" else None
            found[window] = found.get(window, 0) + cost / costs[0]
    return costs[0], tuple(found.items())


def _operations_a_pair(layer: Any) -> float:
    """Return the operations of attention a pair, of a layer's config; 0 where it does not say."""
    heads = _first(layer, ("num_attention_heads",)) or 0
    width = _first(layer, ("head_dim",)) or (_first(layer, ("hidden_size",)) or 0) // (heads or 1)
    # Latent attention (DeepSeek) has keys of another width than values.
    key_width, value_width = _first(layer, ("qk_head_dim",)) or width, _first(layer, ("v_head_dim",)) or width
    return 6.0 * heads * (key_width + value_width)


def _is_attention(kind: str) -> bool:
    return kind in (*FULL_ATTENTION, "sliding_attention")


def _first(text: Any, names: Sequence[str]) -> int | None:
    """Return the first of some keys of a config that is set to a number."""
    values = (getattr(text, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)
