"""Read which trials a group is made of: a file that the launcher writes into the sweep's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import TrainConfig, load
from trainer.config.together import alike, why_alone
from trainer.errors import ConfigError
from trainer.files import parse_json


@dataclass(frozen=True, slots=True)
class HalvingSettings:
    """When and how a group leaves trials behind (``sweep.early_stopping=asha``).

    Attributes:
        min_steps: updates before the first choice.
        reduction_factor: one trial in so many goes on, so many times as far.
        metric: that they are judged by.
        lower_is_better: whether it is a loss.
    """

    min_steps: int
    reduction_factor: int
    metric: str
    lower_is_better: bool


@dataclass(frozen=True, slots=True)
class Group:
    """Trials that are trained together.

    Attributes:
        folder: of the group's own files.
        configs: of its trials, composed and checked.
        halving: how trials are left behind; ``None``: all are trained to their end.
    """

    folder: Path
    configs: list[TrainConfig]
    halving: HalvingSettings | None = None

    @property
    def name(self) -> str:
        """Return what tells the group from others of the sweep."""
        return self.folder.name


def read_group(file: Path) -> Group:
    """Read a group's file: ``{"config", "trials", "halving"}``.

    Raises:
        ConfigError: it is not such a file, or its trials cannot be trained together.
    """
    try:
        content: dict[str, Any] = parse_json(file.read_text())
        config_file = None if content["config"] is None else Path(content["config"])
        trials = [[str(text) for text in overrides] for overrides in content["trials"]]
        halving = None if content["halving"] is None else HalvingSettings(**content["halving"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"is not a group's file: {error}"
        raise ConfigError(str(file), reason=reason, hint="afina sweep writes it") from None
    configs = [load(overrides, config_file) for overrides in trials]
    if not configs:
        raise ConfigError(str(file), reason="has no trials", hint="afina sweep writes it")
    for config in configs:
        if (obstacle := why_alone(config)) is not None:
            raise ConfigError(str(config.run.name), reason=f"is trained alone: {obstacle}", hint="sweep.fuse=off")
        if alike(config) != alike(configs[0]):
            reason = f"is of another base, other data or another batch than {configs[0].run.name}"
            raise ConfigError(str(config.run.name), reason=reason, hint="sweep.fuse=off")
    return Group(file.parent, configs, halving)
