"""Without a network: found out once, in seconds, with the way out; a hub that answers is asked as before."""

from __future__ import annotations

import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub.constants
import pytest
from huggingface_hub.utils import http_backoff

from tests.helpers.processes import ROOT
from trainer.compat.hub import connect, quiet_retries
from trainer.config import load
from trainer.errors import DataError, ModelError
from trainer.models.hub import check_hub

# 46 s and 22 lines it was. A second or two on a free core, and four more where nothing answers.
MOST_SECONDS = 20
MODEL = "model.name_or_path=some-org/some-model"
DATA = ["data.path=some-org/some-data", "data.format=auto"]
LOAD = """
import sys
from trainer.config import load
from trainer.data.sources.hf_datasets import load_hub
from trainer.config.dataset_spec import DatasetSpec
from trainer.errors import AfinaError
from trainer.models.loading import load_tokenizer
from trainer.tracking.logs import configure_logging
configure_logging(stream=sys.stderr)
for name in sys.argv[1:]:
    kind, _, name = name.partition(":")
    try:
        if kind == "model":
            print(name, len(load_tokenizer(name, load(["debug=tiny"]).model)))
        else:
            load_hub(DatasetSpec(name))
    except AfinaError as error:
        print(f"{name}: {error}")
"""


@pytest.fixture
def closed() -> Iterator[str]:
    """The address of a port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def black_hole() -> Iterator[str]:
    """An address that answers to nothing: the queue of its listener is full."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        for each in waiting:
            each.close()


class Hub(http.server.BaseHTTPRequestHandler):
    """Has nothing; keeps one thing private; hangs up twice when asked for another."""

    hung_up = 0

    def do_GET(self) -> None:
        status, code = (401, "GatedRepo") if "private" in self.path else (404, "RepoNotFound")
        if "busy" in self.path and Hub.hung_up < 2:
            Hub.hung_up += 1
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_POST = do_GET

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def start(arguments: list[str], work: Path, endpoint: str, **variables: str) -> subprocess.CompletedProcess[str]:
    own = {"PYTHONPATH": str(ROOT), "HF_HOME": str(work / "hf"), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=work,
        env={**os.environ, **own, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("where", ["closed", "black_hole"])
@pytest.mark.parametrize("keys", [[MODEL], DATA], ids=["model", "data"])
def test_no_network_is_found_out_at_once(
    where: str, keys: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    endpoint = request.getfixturevalue(where)
    begin = time.monotonic()
    done = start(["-m", "trainer.cli", "train", "debug=tiny", *keys], tmp_path, endpoint)
    assert time.monotonic() - begin < MOST_SECONDS
    assert done.returncode == 2, done.stderr
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)
    why = "Connection refused" if where == "closed" else "no answer within 4 s"
    assert f"is not cached, and the hub cannot be reached ({endpoint}: {why})" in done.stderr
    for way_out in ("FOLDER of one that is here", "HF_ENDPOINT=URL of a mirror", "HF_HUB_OFFLINE=1", "hf download"):
        assert way_out in done.stderr
    assert not (tmp_path / "runs").exists()


def test_what_is_cached_is_used_and_said_so(tmp_path: Path, tiny_model: Path, closed: str) -> None:
    cached = tmp_path / "hf" / "hub" / "models--org--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tiny_model, cached / "snapshots" / ("0" * 40))
    done = start(["-c", LOAD, "model:org/tiny", "model:org/tiny", "data:org/data"], tmp_path, closed)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["org/tiny 384"] * 2
    assert lines[2].startswith("org/data: data.path=org/data: there is no such path on this machine, it is not cached")
    assert "the hub cannot be reached" in lines[2]
    told = f"org/tiny is taken from the cache: the hub cannot be reached ({closed}: Connection refused)"
    assert [line for line in done.stderr.splitlines() if "org/tiny" in line] == [told]
    assert "Retrying" not in done.stderr


def test_a_hub_that_answers_is_believed(tmp_path: Path, hub: str) -> None:
    asked = ["model:org/missing", "model:org/private", "data:org/missing"]
    done = start(["-c", LOAD, *asked], tmp_path, hub)
    assert done.returncode == 0, done.stderr
    missing, private, data = done.stdout.splitlines()
    for line in (missing, private):
        assert line.endswith("→ check the name, log in to the hub, or name a local folder")
        assert "cannot be reached" not in line
    assert "gated repo" in private
    assert "the hub has no such data set" in data
    assert "hf auth login" in data
    assert done.stderr == ""


def test_a_busy_hub_is_told_once(
    hub: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], logged: list[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    quiet_retries()
    answer = http_backoff("HEAD", f"{hub}/busy", base_wait_time=0.01)
    assert answer.status_code == 404
    assert Hub.hung_up == 2
    assert "thrown while" not in capfd.readouterr().err
    (line,) = logged
    assert line.startswith("warning: the hub does not answer (")


def test_who_asked_for_no_network_is_told_that_they_did(tmp_path: Path) -> None:
    for keys, error in (([MODEL], ModelError), ([*DATA, "model=tiny"], DataError)):
        with pytest.raises(error, match=r"not cached, and HF_HUB_OFFLINE is set → .*; or HF_HUB_OFFLINE=0 where"):
            check_hub(load(["debug=tiny", *keys]))
    rows = tmp_path / "some-org" / "some-data"
    rows.mkdir(parents=True)
    check_hub(load(["debug=tiny"]))
    check_hub(load(["debug=tiny", f"data.path={rows}", f"model.name_or_path={tmp_path}"]))


def test_a_proxy_is_what_must_be_reached(monkeypatch: pytest.MonkeyPatch, closed: str, hub: str) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("https_proxy", hub)
    assert connect(urlsplit("https://hub.invalid")) is None
    assert connect(urlsplit("http://hub.invalid")) is not None, "the proxy is for https alone"
    monkeypatch.setenv("https_proxy", closed.removeprefix("http://"))
    assert connect(urlsplit("https://hub.invalid")) == "through the proxy 127.0.0.1: Connection refused"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert connect(urlsplit(hub)) is None
