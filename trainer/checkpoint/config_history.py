"""Write a run's config.yaml, keep the one of before, and say what has changed between them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config import TrainConfig, changed_fields, load, to_yaml
from trainer.errors import AfinaError
from trainer.files import write_atomically
from trainer.tracking.files import CONFIG_FILE

logger = logging.getLogger(__name__)


def write_config(folder: Path, config: TrainConfig, step: int, taken: Mapping[str, Any] | None = None) -> None:
    """Write ``config.yaml``; where the run has another one, keep that as ``config-until-step-00000012.yaml``.

    Args:
        folder: the run folder.
        config: of the run from here on.
        step: that it is resumed from.
        taken: what its null, auto and short names stand for.
    """
    file, text = folder / CONFIG_FILE, to_yaml(config, taken)
    before = file.read_text() if file.exists() else text
    if step and before != text:
        write_atomically(folder / f"config-until-step-{step:08d}.yaml", before.encode())
        was = read_config(folder)
        for key, old, new in changed_fields(was, config) if was is not None else ():
            logger.info(f"changed since the run was stopped: {key} was {old}, is {new}")
    write_atomically(file, text.encode())


def read_config(folder: Path) -> TrainConfig | None:
    """Read the configuration that a run was made with; ``None`` where that cannot be read any more (moved data, a key
    of an older version)."""
    try:
        return load([], folder / CONFIG_FILE, only_to_compare=True)
    except AfinaError:
        return None
