"""Switch between adapters, of whatever kinds, on one base that is loaded once.

Stock PEFT keeps several adapters on a base side by side, but of one kind only, and each keeps the biases that the first
one has overwritten. Here an adapter is taken off before the next is put on: the base is then what it was, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.compat.peft import forget_wrapper, unwrapped
from trainer.compat.transformers import is_loaded_in_8bit
from trainer.errors import CheckpointError, ConfigError
from trainer.methods.bottleneck import Bottleneck
from trainer.methods.load import find_base_changing_init, load_adapter, read_adapter_config


class AdapterSwitcher:
    """Switches the adapter on a base model.

    Args:
        base: without adapters.
        adapters: folders by name; ``None`` is the base alone.
        to_device: called with each adapted model, to move what was added to its device.

    Attributes:
        model: what answers now.
        name: of what is on the base; ``None`` before the first :meth:`use`.
    """

    def __init__(
        self,
        base: nn.Module,
        adapters: Mapping[str, Path | None],
        to_device: Callable[[Any], Any] = lambda model: model,
    ) -> None:
        self._base, self._to_device = base, to_device
        self._biases: dict[str, Tensor] = {}
        self.adapters = dict(adapters)
        self.model: Any = base
        self.name: str | None = None

    def use(self, name: str) -> Any:
        """Return the model with this adapter in place of any other, in evaluation mode.

        Raises:
            ConfigError: there is no adapter of this name.
            CheckpointError: it cannot be read, does not fit the base, or would change it; the base alone is left.
        """
        if name not in self.adapters:
            known = ", ".join(self.adapters)
            raise ConfigError("adapter", value=name, reason="there is none of this name", hint=f"one of {known}")
        if name == self.name:
            return self.model
        self._restore_base()
        folder = self.adapters[name]
        if folder is not None:
            self._prepare_base(folder)
            try:
                self.model = self._to_device(load_adapter(self._base, folder))
            except BaseException:
                self._restore_base()
                raise
        self.name = name
        return self.model.eval()

    def _prepare_base(self, folder: Path) -> None:
        """Copy the biases that this adapter will overwrite in the base; refuse one that would change more."""
        metadata = read_adapter_config(folder)
        if init := find_base_changing_init(metadata):
            reason = f"starts in the base's own weights ({init}), so it would change the base for the others"
            raise CheckpointError(str(folder), reason=reason, hint="save it converted, for the base as it was")
        if metadata.get("use_dora") and is_loaded_in_8bit(self._base):
            reason = "is DoRA, whose first forward loses the scales of a base in 8 bits (peft 0.21)"
            raise CheckpointError(str(folder), reason=reason, hint="--bits 4 or --bits 16")
        if metadata.get("bias", "none") != "none":
            biases = {n: p for n, p in self._base.named_parameters() if n.endswith("bias")}
            self._biases = {n: p.detach().clone() for n, p in biases.items()}

    def _restore_base(self) -> None:
        remove_adapters(self._base)
        with torch.no_grad():
            for name, value in self._biases.items():
                self._base.get_parameter(name).copy_(value)
        self._biases, self.model, self.name = {}, self._base, None


def remove_adapters(base: nn.Module) -> None:
    """Remove every adapter from a base model, also one that was put on in part only."""
    done: list[str] = []
    for full, module in list(base.named_modules()):
        if any(full.startswith(f"{name}.") for name in done):
            continue  # a part of what was taken off: trained tokens, adapters on several parameters of a module
        under = module.base_layer if isinstance(module, Bottleneck) else unwrapped(module)
        if under is not None:
            parent, _, name = full.rpartition(".")
            setattr(base.get_submodule(parent), name, under)
            done.append(full)
    forget_wrapper(base)
