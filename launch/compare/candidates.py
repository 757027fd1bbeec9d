"""One method of a comparison."""

from __future__ import annotations

from dataclasses import dataclass, field

from launch.trials import Trial
from trainer.config import TrainConfig


@dataclass(slots=True)
class Candidate:
    """Hold one method of a comparison.

    Attributes:
        name: as the user wrote it.
        overrides: that make its run, but for the learning rate, the rows and the folder.
        config: which they give; ``None`` where it is refused.
        refused: why it cannot be trained here; then nothing is started.
        rate: its learning rate, the method's own or as it was typed.
        fixed: whether it was typed, and is not to be looked for.
        tried: loss on the held-out rows by learning rate, where rates were tried; infinite where a try failed.
        trial: its run.
        error: why that failed.
    """

    name: str
    overrides: list[str]
    config: TrainConfig | None = None
    refused: str | None = None
    rate: float = 0.0
    fixed: bool = False
    tried: dict[float, float] = field(default_factory=dict)
    trial: Trial | None = None
    error: str | None = None
