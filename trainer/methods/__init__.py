"""What is trained: attach adapters or free all weights, count them, save and load them."""

from trainer.methods.adalora import OrthogonalTerm, RankAllocator
from trainer.methods.attach import attach, is_prompt_learning, virtual_tokens
from trainer.methods.initial_weights import start_in_base
from trainer.methods.load import is_adapter, load_adapter
from trainer.methods.parameters import count_parameters, digests, trainable_parameters
from trainer.methods.save import save_adapter, save_full, verify_adapter
from trainer.methods.switch import Switch

__all__ = [
    "OrthogonalTerm",
    "RankAllocator",
    "Switch",
    "attach",
    "count_parameters",
    "digests",
    "is_adapter",
    "is_prompt_learning",
    "load_adapter",
    "save_adapter",
    "save_full",
    "start_in_base",
    "trainable_parameters",
    "verify_adapter",
    "virtual_tokens",
]
