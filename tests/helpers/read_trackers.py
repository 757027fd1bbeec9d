"""What TensorBoard and MLflow have of a run, read with their own readers: ``{step: {key: value}}``."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from pathlib import Path

import pytest

from trainer.tracking.files import read_metrics

INSTALL = "pip install -c constraints.txt -e '.[dev]'"
Values = dict[int, dict[str, float]]


def from_tensorboard(folder: Path) -> Values:
    pytest.importorskip("tensorboard", reason=f"needs tensorboard: {INSTALL}")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    steps: Values = defaultdict(dict)
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            assert tag not in steps[event.step], f"{tag} of step {event.step} stands there twice"
            steps[event.step][tag] = event.value
    return dict(steps)


def from_mlflow(folder: Path) -> Values:
    """But not what it has of the summary."""
    mlflow = pytest.importorskip("mlflow", reason=f"needs mlflow-skinny: {INSTALL}")
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlruns' / 'mlflow.db'}"
    client = mlflow.MlflowClient(uri)
    run_id = (folder / "mlruns" / "run_id.txt").read_text().strip()
    steps: Values = defaultdict(dict)
    for key in client.get_run(run_id).data.metrics:
        for metric in client.get_metric_history(run_id, key):
            if not key.startswith("summary."):
                assert key not in steps[metric.step], f"{key} of step {metric.step} stands there twice"
                steps[metric.step][key] = metric.value
    return dict(steps)


def from_metrics_file(folder: Path) -> Values:
    """What `metrics.jsonl` has: the numbers that the others must have, too."""
    return {
        record["step"]: {key: value for key, value in record.items() if key != "step" and value is not None}
        for record in read_metrics(folder)
    }


READERS = {"tensorboard": from_tensorboard, "mlflow": from_mlflow}


def assert_has_all(folder: Path, tracker: str) -> None:
    """Assert that a tracker has each number of `metrics.jsonl` once, and no other; TensorBoard in single precision."""
    expected, found = from_metrics_file(folder), READERS[tracker](folder)
    assert found.keys() == expected.keys()
    for step, values in expected.items():
        assert found[step] == (pytest.approx(values, rel=1e-6) if tracker == "tensorboard" else values), step
