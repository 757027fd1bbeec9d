"""Check the ``log`` group: what a tracker would refuse once the run has begun is refused before."""

from __future__ import annotations

import importlib.util
import re

from trainer.config.messages import config_error, nearest
from trainer.config.schema import TrainConfig

MAX_TAG_LENGTH = 64
MAX_PROJECT_LENGTH = 128
PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboard", "mlflow": "mlflow-skinny"}
"""What pip calls the package of each tracker; what Python calls it is the tracker's name."""


def check_tracking(config: TrainConfig) -> None:
    """Raise a :class:`ConfigError` for a tracker that there is not, or a project or tag that W&B takes from nobody."""
    log = config.log
    for name in log.trackers:
        if name not in PACKAGES:
            hint = f"log.trackers=[{nearest(name, PACKAGES) or 'tensorboard'}]"
            raise config_error("log.trackers", name, f"must be among {', '.join(PACKAGES)}", hint)
    if log.wandb == "off" or "wandb" not in log.trackers:
        return
    for tag in log.tags:
        if not 1 <= len(tag) <= MAX_TAG_LENGTH:
            reason = f"W&B takes tags of 1 to {MAX_TAG_LENGTH} characters"
            raise config_error("log.tags", tag or "''", reason, "shorter tags, or log.wandb=off")
    plain = re.sub(r"[/\\#?%:]+", "-", log.project)[:MAX_PROJECT_LENGTH]
    if plain != log.project or not plain:
        reason = f"W&B takes up to {MAX_PROJECT_LENGTH} characters, none of them / \\ # ? % :"
        raise config_error("log.project", log.project or "''", reason, f"log.project={plain or 'afina'}")


def check_trackers_installed(config: TrainConfig) -> None:
    """Raise a :class:`ConfigError` for a tracker that was asked for and whose package is not installed.

    A machine without torch does not train: what it submits is checked again where it runs.
    """
    for name in config.log.trackers:
        is_needed = name != "wandb" or config.log.wandb == "online"  # else a line says that W&B is off for this run
        if is_needed and not is_installed(name) and is_installed("torch"):
            reason = f"needs the package {PACKAGES[name]}, which is not installed"
            hint = f"pip install -c constraints.txt {PACKAGES[name]}"
            raise config_error("log.trackers", name, reason, f"{hint}, or log=off" if name == "wandb" else hint)


def is_installed(package: str) -> bool:
    """Return whether a package could be imported, without importing it; a folder of that name is none."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None
