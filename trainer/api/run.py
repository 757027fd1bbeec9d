"""Look at a run folder, and load its model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trainer.config
from trainer.api.restore import restored
from trainer.config import TrainConfig
from trainer.errors import CheckpointError
from trainer.tracking.files import CONFIG_FILE, METRICS_FILE, read_metrics, read_summary

if TYPE_CHECKING:
    from trainer.inference.run_model import RunModel


@dataclass(frozen=True, slots=True)
class Run:
    """A run, as its folder has it at each look; going on, stopped or finished.

    Attributes:
        folder: the run folder.
    """

    folder: Path

    @property
    def config(self) -> TrainConfig:
        """Load the config that it was trained with. Its data may be gone.

        Raises:
            ConfigError: it is of another version, or what it names beside the data is gone.
        """
        return trainer.config.load([], self.folder / CONFIG_FILE, with_data=False, only_to_compare=True)

    @property
    def summary(self) -> dict[str, Any] | None:
        """Read `summary.json`: how the run ended; ``None`` while it has not.

        Raises:
            CheckpointError: it cannot be read.
        """
        return read_summary(self.folder)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Read `metrics.jsonl`: one dict a logged step, step 0 the evaluation before training.

        Raises:
            CheckpointError: it cannot be read.
        """
        return read_metrics(self.folder) if (self.folder / METRICS_FILE).exists() else []

    def model(
        self,
        overrides: Sequence[str] = (),
        *,
        adapter: bool = True,
        bits: int | None = None,
        device_map: str | None = None,
    ) -> RunModel:
        """Load the base with the run's final adapter on it, and the tokenizer; its data may be gone.

        Args:
            overrides: laid over the run's config: ``["generate.max_new_tokens=20"]``.
            adapter: without it the base answers as it did before training.
            bits: hold the base in 16, 8 or 4 bits; ``None``: as in training.
            device_map: passed to transformers (``auto`` spreads the base over the devices); ``None``: one device.

        Returns:
            ``.model`` (a ``PeftModel``; of ``method=full`` the plain model), ``.tokenizer`` and ``.answer(prompt)``.

        Raises:
            CheckpointError: the run has no final adapter or model, or it does not fit.
            ConfigError: an override cannot be used.
        """
        with restored():
            from trainer.inference.run_model import load_run as load_model_of

            return load_model_of(
                self.folder, overrides, adapter=adapter, bits=bits, device_map=device_map, with_data=False
            )


def load_run(folder: str | Path) -> Run:
    """Open a run folder. Loads no torch; ``Run.model`` does.

    Raises:
        CheckpointError: it is none.
    """
    path = Path(folder).expanduser().absolute()
    if not (path / CONFIG_FILE).is_file():
        reason = f"is not a run folder (no {CONFIG_FILE} there)"
        raise CheckpointError("run", value=folder, reason=reason, hint="give the folder that trainer.train wrote")
    return Run(path)
