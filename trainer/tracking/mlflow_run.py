"""Record a run in MLflow, from rank 0: the same MLflow run over all lives of ours, never delaying training."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.config.schema import TrainConfig
from trainer.files import write_atomically
from trainer.redaction import redact
from trainer.tracking.external import (
    first_line,
    flat_config,
    numbers,
    project_name,
    run_bounded,
    unreachable,
)
from trainer.tracking.terminal import TRAINING_KEYS

FOLDER = "mlruns"
DATABASE = "mlflow.db"
RUN_ID_FILE = "run_id.txt"
START_TIMEOUT_SECONDS = 30.0
FINISH_TIMEOUT_SECONDS = 20.0
MAX_VALUE_CHARACTERS = 6000
MAX_PARAMS = 100  # that MLflow takes at once
STATUSES = {"finished": "FINISHED", "preempted": "KILLED", "failed": "FAILED"}

logger = logging.getLogger(__name__)


class MlflowRun:
    """Record a run in MLflow. No method raises or waits for a server; the first problem is logged and ends MLflow for
    this process.

    Args:
        config: the resolved configuration: the run's params.
        folder: the run folder; without ``MLFLOW_TRACKING_URI`` a database in its ``mlruns/`` holds the run.
        model_info: what is recorded beside the config.
        records: what earlier lives of the run logged before the step it is resumed after, in the order of steps. What
            MLflow lacks of it, because a kill or a network took it, is logged first.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        model_info: Mapping[str, Any],
        records: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._folder = folder / FOLDER
        self._run: _Run | None = None
        self._jobs: queue.SimpleQueue[Callable[[_Run], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        try:
            self._start(config, model_info)
        except Exception as error:
            self._run = None
            logger.warning(f"MLflow is off for this run: {first_line(error)}")
            return
        self._thread.start()
        for record in records:
            self.log(record)

    def log(self, record: Mapping[str, Any]) -> None:
        """Log one record under its own step. What an earlier life of the run delivered of a step that is done again is
        left out: MLflow would have it twice."""
        values, step, now = numbers(record), int(record["step"]), int(1000 * time.time())
        self._send(lambda run: run.log(values, step, now))

    def alert(self, title: str, text: str) -> None:
        """Set a tag, as MLflow has no alerts."""
        self._send(lambda run: run.client.set_tag(run.id, "alert", redact(f"{title}: {text}")))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Put the scores of the summary on the run, as metrics ``summary.NAME``, and end it, bounded in time."""
        if self._run is None:
            return
        scores, now = numbers(summary.get("metrics", {})), int(1000 * time.time())
        values = {f"summary.{name}": value for name, value in scores.items()}
        status = STATUSES.get(str(summary.get("status")), "FAILED")
        self._send(lambda run: run.log(values, int(summary.get("steps") or 0), now))
        self._send(lambda run: run.client.set_terminated(run.id, status))
        self._jobs.put(None)
        self._thread.join(FINISH_TIMEOUT_SECONDS)
        if self._thread.is_alive():
            logger.warning(f"MLflow did not finish (no answer in {FINISH_TIMEOUT_SECONDS:.0f} s)")
        self._run = None

    def _send(self, job: Callable[[_Run], object]) -> None:
        if self._run is not None:
            self._jobs.put(job)

    def _work(self) -> None:
        """Send what is to be sent, in order: a server that is slow delays nobody."""
        while (job := self._jobs.get()) is not None:
            run = self._run
            if run is None:
                return
            try:
                job(run)
            except Exception as error:
                # first: once there is no run, nobody waits for this thread, nor for its lines
                logger.warning(f"MLflow stopped recording, training goes on: {first_line(error)}")
                self._run = None
                return

    def _start(self, config: TrainConfig, model_info: Mapping[str, Any]) -> None:
        # Set before the import, which reads it: what is trained here is not MLflow's to count.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow

        for library in ("mlflow", "alembic"):  # each table of a new database, and errors that are told here
            logging.getLogger(library).setLevel(logging.CRITICAL)
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            uri = f"sqlite:///{self._folder.absolute() / DATABASE}"
        elif uri.startswith(("http://", "https://")) and (problem := unreachable(uri)):
            raise ConnectionError(problem)
        opened: list[_Run] = []
        client = mlflow.MlflowClient(tracking_uri=uri)
        problem = run_bounded(
            lambda: opened.append(_open(client, config, self._folder, model_info)), START_TIMEOUT_SECONDS
        )
        if problem:
            raise ConnectionError(problem)
        self._run = opened[0]


class _Run:
    """An open run of MLflow, and which of its numbers were delivered before."""

    def __init__(self, client: Any, id: str) -> None:
        self.client, self.id = client, id
        self._steps: set[int] = set()
        self._scores: set[tuple[str, int]] = set()

    def read_delivered(self, keys: list[str]) -> None:
        """Read which steps it has, by the key that every record has, and which evaluations."""
        self._steps = {metric.step for metric in self.client.get_metric_history(self.id, "epoch")}
        for key in keys:
            if key not in TRAINING_KEYS and not key.startswith("summary."):
                self._scores |= {(key, metric.step) for metric in self.client.get_metric_history(self.id, key)}

    def log(self, values: Mapping[str, float], step: int, milliseconds: int) -> None:
        """Log the numbers of one step that it does not have."""
        from mlflow.entities import Metric

        new = [Metric(key, value, milliseconds, step) for key, value in values.items() if not self._has(key, step)]
        if not new:
            return
        self.client.log_batch(self.id, metrics=new)
        self._scores |= {(metric.key, step) for metric in new}
        if not TRAINING_KEYS.isdisjoint(values):
            self._steps.add(step)

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Log params, which MLflow lets nobody change."""
        from mlflow.entities import Param

        params = [Param(key, str(value)[:MAX_VALUE_CHARACTERS]) for key, value in values.items()]
        for begin in range(0, len(params), MAX_PARAMS):
            self.client.log_batch(self.id, params=params[begin : begin + MAX_PARAMS])

    def _has(self, key: str, step: int) -> bool:
        return step in self._steps if key in TRAINING_KEYS else (key, step) in self._scores


def _open(client: Any, config: TrainConfig, folder: Path, model_info: Mapping[str, Any]) -> _Run:
    """Open the run that the run folder names, or a new one."""
    params = flat_config(config, model_info)
    if (found := _find(client, folder / RUN_ID_FILE)) is not None:
        run = _Run(client, found.info.run_id)
        run.read_delivered(list(found.data.metrics))
        client.update_run(run.id, status="RUNNING")
        run.log_params({key: value for key, value in params.items() if key not in found.data.params})
        return run
    log = config.log
    name = log.name or config.run.name or folder.parent.name
    tags = {"group": log.group, "tags": ",".join(log.tags), "run_folder": str(folder.parent)}
    experiment = _experiment(client, redact(project_name(config, "MLFLOW_EXPERIMENT_NAME")), folder)
    given = {key: redact(value) for key, value in tags.items() if value}
    run = _Run(client, client.create_run(experiment, run_name=redact(name), tags=given).info.run_id)
    write_atomically(folder / RUN_ID_FILE, run.id.encode() + b"\n")
    run.log_params(params)
    return run


def _find(client: Any, id_file: Path) -> Any:
    """Find the run whose id a file holds; ``None`` where there is none, or the server does not know it."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(id_file.read_text().strip())
    except OSError:
        return None
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _experiment(client: Any, name: str, folder: Path) -> str:
    """Return the id of an experiment, made where it is not there."""
    from mlflow.exceptions import MlflowException

    # Without a place of its own, what is filed under a local run would go into the working folder.
    place = None if "MLFLOW_TRACKING_URI" in os.environ else (folder.absolute() / "artifacts").as_uri()
    if (found := client.get_experiment_by_name(name)) is None:
        try:
            return str(client.create_experiment(name, artifact_location=place))
        except MlflowException:
            if (found := client.get_experiment_by_name(name)) is None:  # another trial of a sweep may have made it
                raise
    return str(found.experiment_id)
