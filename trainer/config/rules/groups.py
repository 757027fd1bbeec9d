"""Check the keys of ``optim`` that are of some of the trained parameters alone."""

from __future__ import annotations

from trainer.config.messages import config_error
from trainer.config.method import METHODS
from trainer.config.schema import TrainConfig


def check_groups(config: TrainConfig) -> None:
    """Raise a :class:`ConfigError` for the first rule that the keys break."""
    optim, name = config.optim, config.method.name
    if optim.lora_plus_ratio is not None and name != "lora":
        reason = f"{METHODS[name].title} (method.name={name}) has no B that starts at 0, whose rate it would be"
        if name == "adalora":
            reason = "AdaLoRA starts both of its factors at random and keeps them alike, so they take one rate"
        hint = "optim.lora_plus_ratio=null or method=lora"
        raise config_error("optim.lora_plus_ratio", optim.lora_plus_ratio, reason, hint)
    if optim.decay_biases_and_norms is not None and optim.weight_decay == 0:
        reason = "nothing decays: optim.weight_decay is 0"
        hint = "optim.decay_biases_and_norms=null or optim.weight_decay=0.01"
        raise config_error("optim.decay_biases_and_norms", optim.decay_biases_and_norms, reason, hint)
