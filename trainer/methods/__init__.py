"""What is trained: attach adapters or free all weights, count them, save and load them."""

from trainer.methods.attach import attach, count_parameters, trainable_parameters
from trainer.methods.save import has_learnt, is_adapter, load_adapter, save_adapter, save_full, verify_adapter

__all__ = [
    "attach",
    "count_parameters",
    "has_learnt",
    "is_adapter",
    "load_adapter",
    "save_adapter",
    "save_full",
    "trainable_parameters",
    "verify_adapter",
]
