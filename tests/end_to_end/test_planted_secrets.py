"""Secrets of every shape, planted wherever a user may type or export one, are found in nothing that a run writes,
prints or sends: the run folder, W&B's own files, and all that reaches stand-ins for W&B's server and the hub."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT
from tests.helpers.wandb_runs import FakeServer
from tests.unit.test_redaction import HEART, SHAPES
from trainer.config.rules.tracking import MAX_TAG_LENGTH
from trainer.redaction import HIDDEN

WANDB_KEY = "c0ffee" * 6 + "c0ff"
FOUND = {
    "the heart of one": HEART,
    "a key of AWS": SHAPES["aws"][4:],
    "a key of W&B": SHAPES["wandb"][:20],
    "what a variable holds": "any words that nobody guesses",
}
AUTHORISED = "authorization"  # the header that tells a server who one is


class Hub(http.server.ThreadingHTTPServer):
    """Answers that there is nothing, and keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), HubHandler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        told = [f"{name}: {value}" for name, value in self.headers.items() if name.lower() != AUTHORISED]
        self.server.asked.append("\n".join([self.path, *told, body.decode(errors="replace")]))
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_POST = do_GET

    def log_message(self, *arguments: object) -> None:
        pass


class Wandb(FakeServer):
    """W&B's server, which keeps every body."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        super().__init__()

    def answer(self, path: str, body: bytes) -> dict:
        self.bodies.append(path.encode() + b"\n" + body)
        return super().answer(path, body)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def wandb() -> Iterator[Wandb]:
    server = Wandb()
    yield server
    server.shutdown()
    server.server_close()


def train(work: Path, hub: Hub, wandb: Wandb, *keys: str) -> tuple[int, str]:
    """Run a training with the secrets exported; return its exit code and all that it printed."""
    variables = {
        "PYTHONPATH": str(ROOT),
        "HOME": str(work),
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": SHAPES["hub"],
        "WANDB_MODE": "online",
        "WANDB_BASE_URL": wandb.url,
        "WANDB_API_KEY": WANDB_KEY,
        "AWS_SECRET_ACCESS_KEY": f"aws/{HEART}",
        "MY_DB_PASSWORD": FOUND["what a variable holds"],
    }
    command = [sys.executable, "-m", "trainer.cli", "train", "debug=tiny", "batch.max_steps=2", *keys]
    done = subprocess.run(
        command, cwd=work, env={**os.environ, **variables}, capture_output=True, text=True, timeout=200, check=False
    )
    return done.returncode, done.stdout + done.stderr


def secrets_in(text: str) -> list[str]:
    return [name for name, secret in {**FOUND, "the key of W&B": WANDB_KEY}.items() if secret in text]


def quoted(text: str) -> str:
    """A text as Hydra's grammar takes it."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def test_none_is_found_in_what_a_run_writes_prints_or_sends(
    tmp_path: Path, tiny_model: Path, hub: Hub, wandb: Wandb
) -> None:
    every = ",".join(quoted(secret) for secret in SHAPES.values() if len(secret) <= MAX_TAG_LENGTH)
    places = {
        "log.group": SHAPES["password with @"],
        "log.project": f"mine {SHAPES['openai']}",  # W&B takes no slash in it
        "log.name": SHAPES["signed"],
        "log.entity": SHAPES["wandb new"],
    }
    keys = [f"{name}={quoted(secret)}" for name, secret in places.items()]
    held = FOUND["what a variable holds"]
    code, printed = train(
        tmp_path,
        hub,
        wandb,
        "log.wandb=online",
        "log.trackers=[wandb,tensorboard,mlflow]",
        f"log.tags=[{every},{quoted(f'a tag of {held}')}]",
        "run.name=planted",
        "eval.metrics=[loss]",
        *keys,
    )
    assert code == 0, printed
    assert secrets_in(printed) == []
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written), printed
    assert any(path.name == "mlflow.db" for path in written), printed
    assert any("tfevents" in path.name for path in written), printed
    assert [(str(path), found) for path in written if (found := secrets_in(path.read_bytes().decode("latin-1")))] == []
    assert wandb.upserts, "nothing has reached the stand-in for W&B"
    assert secrets_in(b"\n".join(wandb.bodies).decode("latin-1")) == []
    assert HIDDEN in (tmp_path / "runs" / "planted" / "config.yaml").read_text()
    assert hub.asked == []


@pytest.mark.parametrize("key", ["model.name_or_path", "model.revision", "data.path"])
def test_none_is_sent_to_the_hub(key: str, tmp_path: Path, tiny_model: Path, hub: Hub, wandb: Wandb) -> None:
    keys = ["log=off", "model.name_or_path=org/model", "run.name=x", f"{key}={quoted('org/' + SHAPES['hub'])}"]
    code, printed = train(tmp_path, hub, wandb, *keys)
    assert code == 2, printed
    assert secrets_in(printed) == []
    assert "which would be sent to the hub" in printed
    assert hub.asked == []


def test_a_name_that_the_hub_lacks_is_told_without_the_token(
    tmp_path: Path, tiny_model: Path, hub: Hub, wandb: Wandb
) -> None:
    code, printed = train(tmp_path, hub, wandb, "log=off", "model.name_or_path=org/model", "run.name=x")
    assert code == 2, printed
    assert hub.asked
    assert secrets_in(printed + "\n".join(hub.asked)) == []
