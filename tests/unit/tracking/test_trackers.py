"""TensorBoard and MLflow have what `metrics.jsonl` has, over all lives of a run, and no failure of theirs ends one."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.processes import ROOT
from tests.helpers.read_trackers import INSTALL, READERS, assert_has_all
from tests.helpers.wandb_runs import RECORDS, SUMMARY
from trainer.config import load
from trainer.config.rules import tracking as rules
from trainer.config.schema import TrainConfig
from trainer.errors import ConfigError
from trainer.tracking.tracker import Tracker

PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow"}
each_tracker = pytest.mark.parametrize("name", READERS)


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)


def config_of(*trackers: str) -> TrainConfig:
    for name in trackers:
        pytest.importorskip(PACKAGES[name], reason=f"needs {rules.PACKAGES[name]}: {INSTALL}")
    config = TrainConfig()
    config.data.path = "train.jsonl"
    config.log.trackers = list(trackers)
    config.log.tags = ["one", "two"]
    config.method.r = 8
    return config


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of MLflow without runs: making one takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    live(folder, "mlflow", [])
    return folder / "mlruns" / "mlflow.db"


@pytest.fixture
def folder(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A run folder, with an empty database where the tracker is MLflow."""
    if name == "mlflow":
        (tmp_path / "mlruns").mkdir()
        shutil.copy(request.getfixturevalue("database"), tmp_path / "mlruns")
    return tmp_path


def live(
    folder: Path, name: str, records: Sequence[dict[str, Any]], resume_step: int = 0, status: str | None = "finished"
) -> None:
    """One life of a run; without a ``status`` it is killed."""
    tracker = Tracker.open(
        config_of(name), folder, is_main=True, total_steps=3, resume_step=resume_step, model_info={"device": "cpu"}
    )
    for record in records:
        tracker.log(record)
    if status is not None:
        tracker.close({**SUMMARY, "status": status})


@each_tracker
def test_it_has_what_the_metrics_file_has(name: str, folder: Path) -> None:
    live(folder, name, RECORDS)
    assert_has_all(folder, name)


@each_tracker
def test_steps_that_are_done_again_are_there_once(name: str, folder: Path) -> None:
    live(folder, name, RECORDS, status="preempted")
    assert_has_all(folder, name)
    # saved after step 2, whose evaluation is made after it: now, too
    live(folder, name, [{**RECORDS[2], "eval_loss": 0.5}, RECORDS[3]], resume_step=2)
    assert_has_all(folder, name)


@each_tracker
def test_a_run_that_starts_again_at_step_0_is_there_once(name: str, folder: Path) -> None:
    live(folder, name, RECORDS[:2], status="preempted")
    live(folder, name, RECORDS)
    assert_has_all(folder, name)


@each_tracker
def test_what_a_kill_has_lost_is_there_after_the_resume(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "tensorboard":
        live(folder, name, RECORDS[:3], status="preempted")
        (file,) = (folder / name).iterdir()
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        with monkeypatch.context() as patch:
            patch.setattr("trainer.tracking.mlflow_run._Run.log", lambda *_: None)
            live(folder, name, RECORDS[:3], status="preempted")
        assert READERS[name](folder) == {}
    live(folder, name, [RECORDS[3]], resume_step=2)
    assert_has_all(folder, name)


@each_tracker
def test_a_tracker_that_comes_later_gets_what_there_was_before(name: str, folder: Path) -> None:
    config = config_of()
    tracker = Tracker.open(config, folder, is_main=True, total_steps=3, resume_step=0, model_info={})
    for record in RECORDS[:3]:
        tracker.log(record)
    tracker.close({**SUMMARY, "status": "preempted"})
    live(folder, name, [RECORDS[3]], resume_step=2)
    assert_has_all(folder, name)


def test_mlflow_has_one_run_with_its_config_scores_and_end(tmp_path: Path) -> None:
    import mlflow

    for records, resume_step, status in ((RECORDS[:2], 0, "preempted"), (RECORDS[2:], 1, "finished")):
        live(tmp_path, "mlflow", records, resume_step, status)
        client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlruns' / 'mlflow.db'}")
        (run,) = client.search_runs([client.get_experiment_by_name("afina").experiment_id])
        assert run.info.status == {"preempted": "KILLED", "finished": "FINISHED"}[status]
    assert run.info.run_name == tmp_path.name
    assert (run.data.params["method.r"], run.data.params["facts.device"]) == ("8", "cpu")
    assert run.data.metrics["summary.eval_loss_before"] == 2.5
    assert run.data.tags["tags"] == "one,two"


def test_mlflow_goes_where_its_variables_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason=f"needs mlflow-skinny: {INSTALL}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'shared.db'}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ours")
    for run in ("one", "two"):
        live(tmp_path / run, "mlflow", RECORDS)
        assert_has_all(tmp_path / run, "mlflow")
        assert not (tmp_path / run / "mlruns" / "mlflow.db").exists()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'shared.db'}")
    runs = client.search_runs([client.get_experiment_by_name("ours").experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["one", "two"]


def test_a_server_that_is_not_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    live(tmp_path, "mlflow", RECORDS)
    output = capsys.readouterr()
    lines = [line for line in (output.out + output.err).splitlines() if "MLflow" in line]
    assert lines == [line for line in lines if line.startswith("warning: MLflow is off for this run: ")]
    assert len(lines) == 1
    assert "127.0.0.1 cannot be reached" in lines[0]


def test_a_database_that_breaks_while_training_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mlflow = pytest.importorskip("mlflow", reason=f"needs mlflow-skinny: {INSTALL}")

    def breaks(*_: object, **__: object) -> None:
        raise OSError("the disk is gone")

    tracker = Tracker.open(config_of("mlflow"), tmp_path, is_main=True, total_steps=3, resume_step=0)
    tracker.log(RECORDS[0])
    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", breaks)
    for record in RECORDS[1:]:
        tracker.log(record)
    tracker.close(SUMMARY)
    output = capsys.readouterr().out
    assert output.count("the disk is gone") == 1
    assert "warning: MLflow stopped recording, training goes on: OSError: the disk is gone" in output
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == len(RECORDS)


FULL_DISK = """
import resource, sys
from pathlib import Path
from tests.unit.tracking.test_trackers import config_of, limit
from trainer.tracking.logs import configure_logging
from trainer.tracking.tracker import Tracker
configure_logging()
tracker = Tracker.open(config_of("tensorboard"), Path(sys.argv[1]), is_main=True, total_steps=400, resume_step=0)
limit(20_000)
for step in range(1, 401):
    tracker.log({"step": step, "loss": 0.5})
tracker.close({"status": "finished", "steps": 400})
"""


def limit(file_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    config_of("tensorboard")
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("warning: TensorBoard stopped recording, training goes on: OSError: [Errno 27]") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 400


@pytest.mark.parametrize("trackers", [["tensorboard"], ["mlflow"], []])
def test_only_those_asked_for_leave_anything_and_only_on_rank_0(trackers: list[str], tmp_path: Path) -> None:
    config = config_of(*trackers)
    for is_main in (False, True):
        folder = tmp_path / str(is_main)
        tracker = Tracker.open(config, folder, is_main=is_main, total_steps=3, resume_step=0)
        tracker.log(RECORDS[0])
        tracker.close(SUMMARY)
    assert not (tmp_path / "False").exists()
    left = {path.name for path in (tmp_path / "True").iterdir() if path.is_dir()}
    assert left == {{"mlflow": "mlruns"}.get(name, name) for name in trackers}


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboard"), ("mlflow", "mlflow-skinny")])
def test_a_package_that_is_missing_is_refused_with_the_command(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "is_installed", lambda package: package != name)
    overrides = ["debug=tiny", f"log.trackers=[wandb,{name}]"]
    with pytest.raises(ConfigError) as caught:
        load(overrides)
    reason = f"needs the package {package}, which is not installed"
    assert str(caught.value) == f"log.trackers={name}: {reason} → pip install -c constraints.txt {package}"
    # a machine that only submits has neither
    monkeypatch.setattr(rules, "is_installed", lambda package: False)
    assert load(overrides).log.trackers == ["wandb", name]


def test_a_run_without_wandb_does_not_need_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "is_installed", lambda package: package != "wandb")
    for mode in ("off", "auto", "offline"):
        assert load(["debug=tiny", f"log.wandb='{mode}'"]).log.wandb == mode
    with pytest.raises(ConfigError, match=r"needs the package wandb, which is not installed → .* or log=off"):
        load(["debug=tiny", "log.wandb=online"])


def test_a_tracker_that_there_is_not_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"log.trackers=tensorbord: must be among .* → log.trackers=\[tensorboard\]"):
        load(["debug=tiny", "log.trackers=[tensorbord]"])


def test_wandb_is_the_default_and_only_one_of_them(tmp_path: Path) -> None:
    assert load(["debug=tiny"]).log.trackers == ["wandb"]
    config = config_of("tensorboard")
    config.log.wandb = "offline"
    Tracker.open(config, tmp_path, is_main=True, total_steps=3, resume_step=0).close(SUMMARY)
    assert not (tmp_path / "wandb").exists()
