"""Write a run's config.yaml, keep the one of before, and say what has changed between them."""

from __future__ import annotations

import logging
from pathlib import Path

from trainer.config import TrainConfig, changed_fields, load, to_yaml
from trainer.errors import AfinaError

CONFIG_FILE = "config.yaml"

logger = logging.getLogger(__name__)


def write_config(folder: Path, config: TrainConfig, step: int) -> None:
    """Write ``config.yaml``; where the run has another one, keep that as ``config-until-step-00000012.yaml``.

    Args:
        folder: the run folder.
        config: of the run from here on.
        step: that it is resumed from.
    """
    file, text = folder / CONFIG_FILE, to_yaml(config)
    before = file.read_text() if file.exists() else None
    if step and before is not None and before != text:
        file.rename(folder / f"config-until-step-{step:08d}.yaml")
        for line in _changes(folder / f"config-until-step-{step:08d}.yaml", config):
            logger.info(line)
    file.write_text(text)


def _changes(before: Path, config: TrainConfig) -> list[str]:
    """Name each key that has another value now; one a line."""
    try:
        changed = changed_fields(load([], before), config)
    except AfinaError:
        return []  # moved data, or a key of an older version
    return [f"changed since the run was stopped: {key} was {was}, is {now}" for key, was, now in changed]
