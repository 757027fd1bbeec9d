"""Choose the runtime of a method."""

from __future__ import annotations

from torch import nn

from trainer.config.method import MethodConfig
from trainer.methods.adalora import AdaLoraRuntime
from trainer.methods.runtime import FullRuntime, MethodRuntime

RUNTIMES: dict[str, type[MethodRuntime]] = {"adalora": AdaLoraRuntime, "full": FullRuntime}


def create_runtime(model: nn.Module, method: MethodConfig) -> MethodRuntime:
    """Create what the method does in a run; call it after ``attach`` and before DeepSpeed wraps the model."""
    return RUNTIMES.get(method.name, MethodRuntime)(model, method)
