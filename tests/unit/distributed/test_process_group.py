"""Ranks that could never meet are told so at once."""

from __future__ import annotations

import pytest
import torch

from trainer.distributed.process_group import World, init
from trainer.errors import LaunchError


def test_a_port_of_zero_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``torchrun --master-port=0`` hands it on, without ``--standalone``."""
    monkeypatch.setenv("MASTER_PORT", "0")
    with pytest.raises(LaunchError, match="--master-port=0: is no port"):
        init(World(1, 2, 1, torch.device("cpu")))
