"""Record a run: the one object through which the loop logs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.config.schema import TrainConfig
from trainer.tracking.files import MetricsFile, read_metrics
from trainer.tracking.terminal import Terminal, is_evaluation
from trainer.tracking.wandb_run import WandbRun

logger = logging.getLogger(__name__)


class Tracker:
    """Record a run. This base is what every rank but 0 gets: it does nothing, so that the loop need not ask."""

    @staticmethod
    def open(
        config: TrainConfig,
        folder: Path,
        *,
        is_main: bool,
        total_steps: int,
        resume_step: int,
        model_info: Mapping[str, Any] | None = None,
    ) -> Tracker:
        """Open the tracker of this process.

        Args:
            config: the resolved configuration (``log`` is used here, all of it goes to W&B).
            folder: the run folder; made if it is missing.
            is_main: True on rank 0.
            total_steps: steps of the whole run, for the bar and the time that is left.
            resume_step: the step that the run is resumed from, 0 at a start; later lines of
                `metrics.jsonl` are dropped.
            model_info: what W&B records beside the config (parameters, world size, …).
        """
        if not is_main:
            return Tracker()
        return _MainTracker(config, Path(folder), total_steps, resume_step, model_info or {})

    def log(self, record: Mapping[str, Any]) -> None:
        """Record one step: everything of the step in one mapping with an integer ``step``.

        Written every `log.every_steps` steps, and whenever the record carries an evaluation or is the last. Steps
        rise; the same step once more is merged into its line.
        """

    def alert(self, title: str, text: str) -> None:
        """Log a warning that people should see while the run is going on, and send it as an alert of W&B."""

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show sample answers; each row has ``prompt``, ``reference`` and ``answer``."""

    def close(self, summary: Mapping[str, Any]) -> None:
        """End the record, also of a failed run: stop the bar, finish W&B (bounded in time). ``summary`` as in
        ``write_summary``, which the caller has called before: the file must not wait for a network."""


class _MainTracker(Tracker):
    def __init__(
        self, config: TrainConfig, folder: Path, total_steps: int, resume_step: int, model_info: Mapping[str, Any]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._every_steps = config.log.every_steps
        self._total_steps = total_steps
        self._disk_failure_logged = False
        self._metrics = MetricsFile(folder, resume_step=resume_step)
        self._terminal = Terminal(folder, total_steps=total_steps, resume_step=resume_step)
        # Read after MetricsFile has dropped the lines of steps that are done again.
        self._wandb = WandbRun(config, folder, model_info, read_metrics(folder))

    def log(self, record: Mapping[str, Any]) -> None:
        record = dict(record)
        step = record["step"]
        self._terminal.step(record)
        if step % self._every_steps and step != self._total_steps and not is_evaluation(record):
            return
        try:
            self._metrics.write(record)
        except OSError as error:
            if not self._disk_failure_logged:
                self._disk_failure_logged = True
                logger.info(f"metrics.jsonl cannot be written now ({error.strerror}); training goes on")
        self._wandb.log(record)

    def alert(self, title: str, text: str) -> None:
        logger.info(text)
        self._wandb.alert(title, text)

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._terminal.samples(rows)

    def close(self, summary: Mapping[str, Any]) -> None:
        self._terminal.stop_bar()
        self._metrics.close()
        self._wandb.finish(summary)
        self._terminal.close()  # last: what W&B has to report belongs into log.txt
