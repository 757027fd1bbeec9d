"""What ``import trainer`` gives: load a config, train it in this process, look at a run and use its model.

``trainer/__init__.py`` hands these names on. Nothing here loads torch before it trains or loads a model.
"""

from trainer.api.run import Run, load_run
from trainer.api.training import Result, load, train
from trainer.config import TrainConfig
from trainer.errors import (
    AfinaError,
    CheckpointError,
    ConfigError,
    DataError,
    LaunchError,
    ModelError,
    TrainingError,
)

__all__ = [
    "AfinaError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "LaunchError",
    "ModelError",
    "Result",
    "Run",
    "TrainConfig",
    "TrainingError",
    "load",
    "load_run",
    "train",
]
