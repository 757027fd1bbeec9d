"""Attach, count, save and load what is trained: adapters of every method, or all weights."""

from trainer.methods.attach import attach, is_prompt_learning, virtual_tokens
from trainer.methods.load import is_adapter, load_adapter
from trainer.methods.parameters import count_parameters, trainable_parameters
from trainer.methods.registry import create_runtime
from trainer.methods.runtime import MethodRuntime, WholeTensors
from trainer.methods.save import save_adapter, save_full, verify_adapter
from trainer.methods.switch import AdapterSwitcher

__all__ = [
    "AdapterSwitcher",
    "MethodRuntime",
    "WholeTensors",
    "attach",
    "count_parameters",
    "create_runtime",
    "is_adapter",
    "is_prompt_learning",
    "load_adapter",
    "save_adapter",
    "save_full",
    "trainable_parameters",
    "verify_adapter",
    "virtual_tokens",
]
