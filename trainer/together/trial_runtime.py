"""Save one trial of several that share a model as a run of its own does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trainer.config.method import MethodConfig
from trainer.methods import MethodRuntime, save_adapter
from trainer.methods.parameters import trial_parameters


class TrialRuntime(MethodRuntime):
    """LoRA in one of several adapters.

    Args:
        model: with all adapters attached, before DeepSpeed wraps it.
        method: the ``method`` group of the trial.
        name: of its adapter.
    """

    def __init__(self, model: nn.Module, method: MethodConfig, name: str) -> None:
        self.name = name
        super().__init__(model, method)
        assert not self.initial_weights, "the trials of a group leave the base as it is"

    def trained(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the trial's parameters, by the names that a run of its own gives them."""
        return trial_parameters(model, self.name)

    def save(self, model: Any, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write the trial's adapter as a run of its own does, and read it back."""
        save_adapter(model, folder, weights, base=self.base, adapter_name=self.name)
