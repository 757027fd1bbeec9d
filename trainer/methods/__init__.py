"""What is trained: attach adapters or free all weights, count them, save and load them."""

from trainer.methods.adalora import OrthogonalTerm, RankAllocator
from trainer.methods.attach import attach, is_prompt_learning, virtual_tokens
from trainer.methods.initial_weights import copy_initial_weights
from trainer.methods.load import is_adapter, load_adapter
from trainer.methods.parameters import count_parameters, digests, trainable_parameters
from trainer.methods.save import save_adapter, save_full, verify_adapter
from trainer.methods.switch import AdapterSwitcher

__all__ = [
    "AdapterSwitcher",
    "OrthogonalTerm",
    "RankAllocator",
    "attach",
    "copy_initial_weights",
    "count_parameters",
    "digests",
    "is_adapter",
    "is_prompt_learning",
    "load_adapter",
    "save_adapter",
    "save_full",
    "trainable_parameters",
    "verify_adapter",
    "virtual_tokens",
]
