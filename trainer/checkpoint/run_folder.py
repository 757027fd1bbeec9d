"""Open a run folder: fresh, resumed, or already finished. Rank 0 looks and decides, the others follow."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint.config_history import read_config
from trainer.checkpoint.finished import finished_lines
from trainer.checkpoint.owner import own_run, show_owner
from trainer.checkpoint.resume import find_resume_point
from trainer.config import TrainConfig, changed_result_fields, run_folder
from trainer.distributed.process_group import World, from_main
from trainer.errors import AfinaError, ConfigError
from trainer.files import move_aside
from trainer.tracking.files import METRICS_FILE, RUN_FILES, SUMMARY_FILE, read_metrics, read_summary

LENGTH = {"batch.max_steps", "batch.epochs"}  # what may be raised after the end

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Run:
    """A run folder.

    Attributes:
        folder: ``run.dir / run.name``.
        resume_from: the checkpoint to resume from; ``None`` starts at step 0.
        finished: the summary of a run that needs nothing more.
    """

    folder: Path
    resume_from: Path | None = None
    finished: dict[str, Any] | None = None

    def scores_before(self) -> dict[str, float]:
        """Read the evaluation before training from metrics.jsonl; empty when there was none."""
        first = next((r for r in self._metrics() if r["step"] == 0), {})
        return {k: v for k, v in first.items() if k not in ("step", "epoch")}

    def last_logged_step(self) -> int:
        """Read the last step in metrics.jsonl; 0 when there is none."""
        return max((int(r["step"]) for r in self._metrics()), default=0)

    def elapsed_before(self) -> float:
        """Read the wall time of the run's earlier lives, in seconds, as far as they have logged it; 0 at a start."""
        if self.resume_from is None:
            return 0.0
        return max((float(r.get("elapsed_seconds") or 0.0) for r in self._metrics()), default=0.0)

    def _metrics(self) -> list[dict[str, Any]]:
        """A run that fails while its model is loaded has no file yet."""
        return read_metrics(self.folder) if (self.folder / METRICS_FILE).exists() else []


@contextmanager
def open_run(config: TrainConfig, world: World, total_steps: int, data_fingerprint: str) -> Iterator[Run]:
    """Own the run folder inside the ``with`` block, and find out what there is to do. A collective.

    Args:
        config: the whole configuration.
        world: this process.
        total_steps: updates of the whole run: a finished one of fewer is extended.
        data_fingerprint: of the prepared rows: a finished run of others says so.

    Raises:
        ConfigError: the folder holds a finished run of another configuration.
        CheckpointError: the checkpoint to resume from cannot be used.
        LaunchError: another process owns the run.
    """
    decision: Run | AfinaError = Run(Path())
    with ExitStack() as held:
        if world.is_main:
            try:
                held.enter_context(own_run(run_folder(config)))
                decision = _decide(config, total_steps, data_fingerprint)
                if decision.finished is None:
                    held.enter_context(show_owner(decision.folder))
            except AfinaError as error:
                decision = error
        decision = from_main(decision)
        if isinstance(decision, AfinaError):
            if world.is_main:
                raise decision
            raise SystemExit(decision.exit_code)  # rank 0 reports it once
        yield decision


def _decide(config: TrainConfig, total_steps: int, data_fingerprint: str) -> Run:
    folder = run_folder(config)
    if config.run.overwrite and folder.exists():
        aside = move_aside(folder, RUN_FILES)
        logger.info(f"run.overwrite: the old run was moved to {aside}")
    summary = read_summary(folder) if folder.exists() else None
    if summary and summary.get("status") == "finished":
        if (extended := _extend(config, folder, summary, total_steps)) is not None:
            return extended
        _same_result(config, folder)
        for line in finished_lines(folder, read_config(folder) or config, summary):
            logger.info(line)
        if summary.get("data_fingerprint") not in (None, data_fingerprint):
            logger.warning("its rows have changed since: what it reports is of the rows that it was trained on")
        return Run(folder, finished=summary)
    folder.mkdir(parents=True, exist_ok=True)
    return Run(folder, resume_from=find_resume_point(folder, config.checkpoint.resume))


def _extend(config: TrainConfig, folder: Path, summary: dict[str, Any], total_steps: int) -> Run | None:
    """Resume a finished run whose steps were raised; ``None`` where nothing else is asked for, or nothing is kept.

    Its summary is kept under the number of its steps: while the run goes on there is no end of it.
    """
    steps = int(summary.get("steps") or 0)
    changed = _changed(config, folder)
    if changed is None or not changed or {key for key, _, _ in changed} - LENGTH or total_steps <= steps:
        return None
    resume_from = find_resume_point(folder, config.checkpoint.resume)
    if resume_from is None:
        return None
    (folder / SUMMARY_FILE).rename(folder / f"summary-{steps:08d}.json")
    logger.info(
        f"{folder} was finished after {steps} steps and goes on to {total_steps}; from here on the learning rate "
        f"follows the schedule of {total_steps} steps"
    )
    return Run(folder, resume_from=resume_from)


def _changed(config: TrainConfig, folder: Path) -> list[tuple[str, Any, Any]] | None:
    """Compare with the configuration that a run was made with, by what changes the result; ``None`` where that cannot
    be read any more."""
    before = read_config(folder)
    return None if before is None else changed_result_fields(before, config)


def _same_result(config: TrainConfig, folder: Path) -> None:
    """Refuse a finished run of other settings: it answers only for the configuration that it was run with."""
    changed = [f"{key} {was} → {now}" for key, was, now in _changed(config, folder) or []]
    if changed:
        raise ConfigError(
            str(folder),
            reason="is a finished run with other settings "
            f"({', '.join(changed[:4])}{' …' if len(changed) > 4 else ''})",
            hint="another run.name, or run.overwrite=true (the old folder is moved aside)",
        )
