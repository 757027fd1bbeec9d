"""W&B for real: what is logged is what its file and its server get, and a missing network costs seconds, once."""

import json
import math
import os
import re
import socket
import subprocess
import sys
import time

import pytest

from tests.helpers.wandb_runs import RECORDS, SUMMARY, history_of, key_of, offline_files, record_run, wandb_config
from trainer.config.schema import TrainConfig
from trainer.tracking.files import read_metrics
from trainer.tracking.tracker import Tracker
from trainer.tracking.wandb_file import read_records
from trainer.tracking.wandb_run import api_key, names, wanted_mode

pytestmark = pytest.mark.usefixtures("own_home")


def same(found: object, expected: object) -> bool:
    """Equal, where what is not a number is W&B's string for it."""
    is_nan = isinstance(expected, float) and math.isnan(expected)
    return found in ("NaN", None) or found != found if is_nan else found == expected


@pytest.mark.slow
def test_an_offline_run_holds_exactly_what_was_logged(tmp_path, capfd):
    record_run(tmp_path / "run", RECORDS)
    (path,) = offline_files(tmp_path / "run")
    records = list(read_records(path))
    history = history_of(records)
    assert list(history) == [0, 1, 2, 3]
    for record in RECORDS:
        expected = {key: value for key, value in record.items() if key != "step"}
        assert history[record["step"]].keys() == expected.keys()
        assert all(same(history[record["step"]][key], value) for key, value in expected.items()), history
    # The file of the run folder says the same.
    for line in read_metrics(tmp_path / "run"):
        assert all(value is None or history[line["step"]][key] == value for key, value in line.items() if key != "step")

    runs = [record.run for record in records if record.HasField("run")]
    run = runs[0]
    assert (run.project, run.run_group, run.display_name, list(run.tags)) == (
        "tests",
        "a group",
        "a name",
        ["one", "two"],
    )
    assert run.run_id == (tmp_path / "run" / "wandb" / "run_id.txt").read_text().strip()
    config = {key_of(item): json.loads(item.value_json) for item in run.config.update}
    assert config["method"]["r"] == 8
    assert config["optim"]["learning_rate"] == 4.9e-4
    assert config["facts"] == {"trainable_parameters": 10}

    summary: dict = {}
    for record in records:
        summary |= {key_of(item): json.loads(item.value_json) for item in record.summary.update}
    assert summary["eval_loss"] == 0.375
    assert summary["eval_loss_before"] == 2.5
    assert summary["train_loss"] == 0.25
    assert summary["status"] == "finished"
    output = capfd.readouterr()
    assert "wandb" not in output.err
    assert "wandb:" not in output.out


@pytest.mark.slow
@pytest.mark.parametrize("network", ["none", "there", "lost"])
def test_an_alert_arrives_and_holds_nothing_up(tmp_path, server, capsys, monkeypatch, network):
    monkeypatch.setattr("trainer.tracking.wandb_run.FINISH_TIMEOUT_SECONDS", 2.0)
    config = wandb_config("offline" if network == "none" else "online")
    tracker = Tracker.open(config, tmp_path, is_main=True, total_steps=3, resume_step=0, model_info={})
    tracker.log(RECORDS[0])
    server.silent = network == "lost"
    start = time.monotonic()
    tracker.alert("overfitting", "eval_loss is too far above")
    tracker.log(RECORDS[1])
    assert time.monotonic() - start < 2
    tracker.close(SUMMARY)
    assert time.monotonic() - start < 12
    assert "eval_loss is too far above" in capsys.readouterr().out
    if network == "none":
        (path,) = offline_files(tmp_path)
        (alert,) = [record.alert for record in read_records(path) if record.HasField("alert")]
        assert (alert.title, alert.text, alert.level) == ("overfitting", "eval_loss is too far above", "WARN")
    if network == "there":
        (sent,) = server.alerts
        assert (sent["title"], sent["text"], sent["severity"]) == ("overfitting", "eval_loss is too far above", "WARN")


@pytest.mark.slow
def test_a_restarted_run_goes_on_under_the_same_id(tmp_path):
    folder = tmp_path / "run"
    record_run(folder, RECORDS[:3])
    record_run(folder, RECORDS[2:], resume_step=1)
    ids = {next(r.run.run_id for r in read_records(path) if r.HasField("run")) for path in offline_files(folder)}
    assert ids == {(folder / "wandb" / "run_id.txt").read_text().strip()}
    assert [record["step"] for record in read_metrics(folder)] == [0, 1, 2, 3]
    record_run(tmp_path / "other", RECORDS[:1])
    assert (tmp_path / "other" / "wandb" / "run_id.txt").read_text().strip() not in ids


def test_off_leaves_nothing(tmp_path, monkeypatch):
    record_run(tmp_path / "a", RECORDS, mode="off")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    record_run(tmp_path / "b", RECORDS, mode="auto")
    assert not (tmp_path / "a" / "wandb").exists()
    assert not (tmp_path / "b" / "wandb").exists()


def test_online_without_a_key_asks_nothing_and_goes_offline(tmp_path, capsys):
    record_run(tmp_path / "run", RECORDS, mode="online")
    assert "W&B records this run offline: there is no API key" in capsys.readouterr().out
    assert len(offline_files(tmp_path / "run")) == 1


def test_the_mode_and_the_key_that_count(monkeypatch, tmp_path):
    assert [wanted_mode(mode) for mode in ("auto", "online", "offline", "off")] == ["auto", "online", "offline", "off"]
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert (wanted_mode("auto"), wanted_mode("online")) == ("offline", "online")
    assert api_key("https://api.wandb.ai") is None
    (tmp_path / "home" / ".netrc").write_text(f"machine my.host:8080 login user password {'b' * 40}\n")
    assert api_key("https://api.wandb.ai") is None
    assert api_key("http://my.host:8080") == "b" * 40
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    assert api_key("http://my.host:8080") == "a" * 40


def test_with_a_key_and_a_server_the_run_is_online_and_goes_on_under_its_id(server, tmp_path):
    folder = tmp_path / "run"
    record_run(folder, RECORDS, mode="auto")
    assert offline_files(folder) == []
    history = {line["_step"]: line for line in server.history}
    assert list(history) == [0, 1, 2, 3]
    for record in RECORDS:
        assert all(same(history[record["step"]][key], value) for key, value in record.items() if key != "step")
    assert server.exit_codes == [0]
    record_run(folder, RECORDS[3:], mode="auto", resume_step=2)
    assert {upsert["name"] for upsert in server.upserts} == {(folder / "wandb" / "run_id.txt").read_text().strip()}
    assert server.upserts[0]["groupName"] == "a group"


# A process of its own: the exit of the interpreter is a place where wandb may wait too.
LOST_NETWORK_RUN = """
import sys, time
from pathlib import Path
from tests.helpers.wandb_runs import RECORDS, SUMMARY, wandb_config
from trainer.tracking.tracker import Tracker
start = time.monotonic()
config, folder = wandb_config("auto"), Path(sys.argv[1])
tracker = Tracker.open(config, folder, is_main=True, total_steps=3, resume_step=0, model_info={})
print("OPEN", time.monotonic() - start)
start = time.monotonic()
for record in RECORDS:
    tracker.log(record)
print("LOG", time.monotonic() - start)
start = time.monotonic()
tracker.close(SUMMARY)
print("CLOSE", time.monotonic() - start)
"""


@pytest.mark.slow
@pytest.mark.parametrize("network", ["refused", "black hole"])
def test_without_a_network_nothing_waits_and_the_run_is_recorded_offline(tmp_path, network):
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        if network == "black hole":
            hole.listen(64)
        environment = {
            **os.environ,
            "WANDB_API_KEY": "a" * 40,
            "WANDB_BASE_URL": f"http://127.0.0.1:{hole.getsockname()[1]}",
        }
        start = time.monotonic()
        command = [sys.executable, "-c", LOST_NETWORK_RUN, str(tmp_path / "run")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
        wall_seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    seconds = {name: float(value) for name, value in re.findall(r"^(OPEN|LOG|CLOSE) (\S+)$", done.stdout, re.M)}
    print(network, seconds, wall_seconds)
    # Of these wandb's import takes 1 to 3.
    assert seconds["OPEN"] < (10 if network == "refused" else 20)
    assert seconds["LOG"] < 2
    assert seconds["CLOSE"] < 10
    assert wall_seconds < 30
    assert done.stdout.count("W&B records this run offline") == 1
    (path,) = offline_files(tmp_path / "run")
    assert list(history_of(read_records(path))) == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_network_that_goes_away_later_bounds_the_end(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("trainer.tracking.wandb_run.FINISH_TIMEOUT_SECONDS", 2.0)
    tracker = Tracker.open(wandb_config("auto"), tmp_path, is_main=True, total_steps=3, resume_step=0, model_info={})
    tracker.log(RECORDS[0])
    server.silent = True
    start = time.monotonic()
    for record in RECORDS[1:]:
        tracker.log(record)
    assert time.monotonic() - start < 2
    start = time.monotonic()
    tracker.close(SUMMARY)
    assert time.monotonic() - start < 10
    assert "W&B did not finish" in capsys.readouterr().out
    (path,) = (tmp_path / "wandb").glob("run-*/*.wandb")
    assert list(history_of(read_records(path))) == [0, 1, 2, 3]


def test_a_failure_of_wandb_is_said_once_and_the_run_goes_on(tmp_path, capsys):
    tracker = Tracker.open(wandb_config(), tmp_path, is_main=True, total_steps=3, resume_step=0, model_info={})
    tracker.log(RECORDS[0])
    # Its service process dies, as it may by the kernel's hand when memory is short.
    mine = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "wandb-core"], capture_output=True, text=True)
    (service,) = mine.stdout.split()
    os.kill(int(service), 9)
    time.sleep(0.5)
    tracker.alert("overfitting", "a warning")
    for record in RECORDS[1:]:
        tracker.log(record)
    tracker.close(SUMMARY)
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1, 2, 3]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("W&B")]
    assert len(said) == 1, said


def test_the_environments_project_and_name_count_where_the_config_leaves_its_default(tmp_path, monkeypatch, logged):
    config = TrainConfig()
    assert names(config, tmp_path / "run") == {"project": "afina", "name": "run"}
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_NAME", "mine")
    assert names(config, tmp_path / "run") == {"project": "theirs", "name": "mine"}
    config.log.project, config.log.name = "typed", "named"
    assert names(config, tmp_path / "run") == {"project": "typed", "name": "named"}
    assert logged == []
    monkeypatch.setenv("WANDB_DIR", "elsewhere")
    names(config, tmp_path / "run")
    assert len(logged) == 1
    assert logged[0].startswith("WANDB_DIR is not taken")
