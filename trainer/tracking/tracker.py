"""Record a run: the one object through which the loop logs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from trainer.config.schema import TrainConfig
from trainer.tracking.files import MetricsFile, read_metrics
from trainer.tracking.log_only import LogOnly
from trainer.tracking.mlflow_run import MlflowRun
from trainer.tracking.tensorboard_run import TensorboardRun
from trainer.tracking.terminal import Terminal, is_evaluation
from trainer.tracking.wandb_run import WandbRun

logger = logging.getLogger(__name__)


class ExternalRun(Protocol):
    """A run in a tracker outside the run folder's own files. No method raises or waits for long: the first problem is
    logged and ends it for this process."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Log the numbers of a record under its step."""

    def alert(self, title: str, text: str) -> None:
        """Show an alert."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Put the summary on the run and end it."""


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
        alone: bool = True,
    ) -> Tracker:
        """Open the tracker of this process.

        Args:
            config: the resolved configuration (``log`` is used here, all of it goes to the trackers).
            folder: the run folder; made if it is missing.
            is_main: True on rank 0.
            total_steps: steps of the whole run, for the bar and the time that is left.
            resume_step: the step that the run is resumed from, 0 at a start; later lines of
                `metrics.jsonl` are dropped.
            model_info: what trackers record beside the config (parameters, world size, …).
            alone: show the run on the terminal; else it is one of several in this process, and writes its lines into
                its `log.txt` alone.
        """
        if not is_main:
            return Tracker()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        terminal = (
            Terminal(folder, total_steps=total_steps, resume_step=resume_step)
            if alone
            else LogOnly(folder, total_steps=total_steps)
        )
        return _MainTracker(config, folder, terminal, total_steps, resume_step, model_info or {})

    def log(self, record: Mapping[str, Any]) -> None:
        """Record one step: everything of the step in one mapping with an integer ``step``.

        Written every `log.every_steps` steps, and whenever the record carries an evaluation or is the last. Steps
        rise; the same step once more is merged into its line.
        """

    def alert(self, title: str, text: str) -> None:
        """Log a warning that people should see while the run is going on, and send it to the trackers."""

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show sample answers; each row has ``prompt``, ``reference`` and ``answer``."""

    def close(self, summary: Mapping[str, Any]) -> None:
        """End the record, also of a failed run: stop the bar, finish the trackers (bounded in time). ``summary`` as in
        ``write_summary``, which the caller has called before: the file must not wait for a network."""


class _MainTracker(Tracker):
    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        terminal: Terminal | LogOnly,
        total_steps: int,
        resume_step: int,
        model_info: Mapping[str, Any],
    ) -> None:
        self._every_steps = config.log.every_steps
        self._total_steps = total_steps
        self._disk_failure_logged = False
        self._metrics = MetricsFile(folder, resume_step=resume_step)
        self._terminal = terminal
        # Read after MetricsFile has dropped the lines of steps that are done again.
        records = read_metrics(folder)
        self._external = [
            _open(name, config, folder, model_info, records) for name in dict.fromkeys(config.log.trackers)
        ]

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
        for run in self._external:
            run.log(record)

    def alert(self, title: str, text: str) -> None:
        logger.info(text)
        for run in self._external:
            run.alert(title, text)

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._terminal.samples(rows)

    def close(self, summary: Mapping[str, Any]) -> None:
        self._terminal.stop_bar()
        self._metrics.close()
        for run in self._external:
            run.finish(summary)
        self._terminal.close()  # last: what they have to report belongs into log.txt


def _open(
    name: str,
    config: TrainConfig,
    folder: Path,
    model_info: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
) -> ExternalRun:
    """Open the run in one of ``log.trackers``, resumed where there is one of this run folder."""
    if name == "tensorboard":
        return TensorboardRun(config, folder, model_info, records)
    if name == "mlflow":
        return MlflowRun(config, folder, model_info, records)
    return WandbRun(config, folder, model_info, records)
