"""Save tensors and read them back."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.errors import CheckpointError


def save_verified(tensors: dict[str, Tensor], file: Path) -> None:
    """Save tensors as safetensors and compare what is on the disk with them, one after the other.

    Raises:
        CheckpointError: the file does not read back as it was written.
        OSError, SafetensorError: it could not be written.
    """
    save_file(tensors, str(file))
    with safe_open(file, "pt") as reread:
        same = set(reread.keys()) == set(tensors)
        if not same or any(not torch.equal(reread.get_tensor(name), tensor) for name, tensor in tensors.items()):
            raise CheckpointError(str(file), reason="does not read back as it was written")
