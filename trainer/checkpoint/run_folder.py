"""Open a run folder: fresh, resumed, or already finished. Rank 0 looks and decides, the others follow."""

from __future__ import annotations

import itertools
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint.resume import find_resume_point
from trainer.config import TrainConfig, changed_result_fields, load, run_folder
from trainer.distributed.process_group import World, from_main
from trainer.errors import AfinaError, ConfigError
from trainer.tracking.files import METRICS_FILE, read_metrics, read_summary

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

    def _metrics(self) -> list[dict[str, Any]]:
        """A run that fails while its model is loaded has no file yet."""
        return read_metrics(self.folder) if (self.folder / METRICS_FILE).exists() else []


def open_run(config: TrainConfig, world: World) -> Run:
    """Open the run folder and find out what there is to do. A collective.

    Raises:
        ConfigError: the folder holds a finished run of another configuration.
        CheckpointError: the checkpoint to resume from cannot be used.
    """
    decision: Run | AfinaError
    try:
        decision = _decide(config) if world.is_main else Run(Path())
    except AfinaError as error:
        decision = error
    decision = from_main(decision)
    if isinstance(decision, AfinaError):
        if world.is_main:
            raise decision
        raise SystemExit(decision.exit_code)  # rank 0 reports it once
    return decision


def _decide(config: TrainConfig) -> Run:
    folder = run_folder(config)
    if config.run.overwrite and folder.exists():
        aside = _unused(folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}"))
        folder.rename(aside)
        logger.info(f"run.overwrite: the old run was moved to {aside}")
    summary = read_summary(folder) if folder.exists() else None
    if summary and summary.get("status") == "finished":
        _same_result(config, folder)
        logger.info(f"{folder} is finished; nothing is redone (run.overwrite=true starts afresh)")
        logger.info(json.dumps(summary, indent=1))
        return Run(folder, finished=summary)
    folder.mkdir(parents=True, exist_ok=True)
    return Run(folder, resume_from=find_resume_point(folder, config.checkpoint.resume))


def _unused(path: Path) -> Path:
    """Return the path, or it with a number behind: two may be moved aside within one second."""
    numbered = (path.with_name(f"{path.name}-{n}") for n in itertools.count(2))
    return path if not path.exists() else next(p for p in numbered if not p.exists())


def _same_result(config: TrainConfig, folder: Path) -> None:
    """Refuse a finished run of other settings: it answers only for the configuration that it was run with."""
    try:
        before = load([], folder / "config.yaml")
    except AfinaError:
        return  # moved data, or a key of an older version: the summary still stands
    changed = [f"{key} {was} → {now}" for key, was, now in changed_result_fields(before, config)]
    if changed:
        raise ConfigError(
            str(folder),
            reason="is a finished run with other settings "
            f"({', '.join(changed[:4])}{' …' if len(changed) > 4 else ''})",
            hint="another run.name, or run.overwrite=true (the old folder is moved aside)",
        )
