"""Group the trained parameters by their learning rate and weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft.tuners.lora.layer import Embedding
from torch import nn

from trainer.compat.deepspeed import whole_shape
from trainer.config.schema import TrainConfig
from trainer.engine.learning_rate import peak_learning_rate

RATE_FACTOR, IS_SPARED = "rate_factor", "is_spared"
EMBEDDING_RATE = 1e-6  # LoRA+: peak rate of adapters of embeddings, its authors' own


def parameter_groups(
    model: nn.Module, trained: Mapping[str, nn.Parameter], config: TrainConfig
) -> list[dict[str, Any]]:
    """Group the trained parameters; one group where nothing asks for more.

    Args:
        model: of the parameters.
        trained: by their names in it, in its order.
        config: the whole configuration.

    Returns:
        Groups as optimizers take them: ``params``, ``weight_decay``, and two keys of ours: ``rate_factor``, what the
        step's learning rate is multiplied by, and ``is_spared``, whether its parameters are biases and norms that do
        not decay.
    """
    optim = config.optim
    spares = optim.weight_decay > 0 and not optim.decay_biases_and_norms
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        factor = 1.0 if optim.lora_plus_ratio is None else _lora_plus(model, name, parameter, config)
        groups.setdefault((factor, spares and is_bias_or_norm(model, name)), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if is_spared else optim.weight_decay,
            RATE_FACTOR: factor,
            IS_SPARED: is_spared,
        }
        for (factor, is_spared), parameters in groups.items()
    ]


def is_bias_or_norm(model: nn.Module, name: str) -> bool:
    """Return whether a parameter is a bias, or belongs to a normalisation, by the name of its module's class."""
    owner, _, own = name.rpartition(".")
    return "bias" in own or "norm" in type(model.get_submodule(owner)).__name__.lower()


def set_rates(groups: list[dict[str, Any]], learning_rate: float) -> None:
    """Set the learning rate of each group of an optimizer."""
    for group in groups:
        group["lr"] = learning_rate * group[RATE_FACTOR]


def decay_spared(groups: list[dict[str, Any]], weight_decay: float) -> None:
    """Let biases and norms decay from here on, too."""
    for group in groups:
        if group[IS_SPARED]:
            group["weight_decay"] = weight_decay


def _lora_plus(model: nn.Module, name: str, parameter: nn.Parameter, config: TrainConfig) -> float:
    """Return what LoRA+ multiplies the rate of a parameter by (Hayou et al., 2024), as ``create_loraplus_optimizer`` of
    PEFT does: B by the ratio, and vectors (biases, DoRA's magnitudes); adapters of embeddings have a rate of their own.
    """
    assert config.optim.lora_plus_ratio is not None, "LoRA+ is asked for"
    layer = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
    if isinstance(layer, Embedding):
        return EMBEDDING_RATE / peak_learning_rate(config)
    return config.optim.lora_plus_ratio if "lora_B" in name or len(whole_shape(parameter)) == 1 else 1.0
