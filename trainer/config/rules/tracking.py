"""Check the ``log`` group: what W&B would refuse once the run has begun is refused before."""

from __future__ import annotations

import re

from trainer.config.messages import config_error
from trainer.config.schema import TrainConfig

MAX_TAG_LENGTH = 64
MAX_PROJECT_LENGTH = 128


def check_tracking(config: TrainConfig) -> None:
    """Raise a :class:`ConfigError` for a project or a tag that W&B takes from nobody."""
    log = config.log
    if log.wandb == "off":
        return
    for tag in log.tags:
        if not 1 <= len(tag) <= MAX_TAG_LENGTH:
            reason = f"W&B takes tags of 1 to {MAX_TAG_LENGTH} characters"
            raise config_error("log.tags", tag or "''", reason, "shorter tags, or log.wandb=off")
    plain = re.sub(r"[/\\#?%:]+", "-", log.project)[:MAX_PROJECT_LENGTH]
    if plain != log.project or not plain:
        reason = f"W&B takes up to {MAX_PROJECT_LENGTH} characters, none of them / \\ # ? % :"
        raise config_error("log.project", log.project or "''", reason, f"log.project={plain or 'afina'}")
