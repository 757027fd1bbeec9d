"""Runs that record in W&B, what their files hold, and as much of W&B's server as they need."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import json
import math
import re
import threading
import time
from pathlib import Path

from trainer.config.schema import TrainConfig
from trainer.tracking.files import write_summary
from trainer.tracking.tracker import Tracker

SUMMARY = {
    "status": "finished",
    "steps": 3,
    "wall_seconds": 1.5,
    "trainable_parameters": 10,
    "total_parameters": 100,
    "train_loss": 0.25,
    "metrics": {"eval_loss": 0.375, "eval_loss_before": 2.5},
}
RECORDS = [
    {"step": 0, "epoch": 0.0, "eval_loss": 2.5},
    {"step": 1, "epoch": 0.5, "loss": 1 / 3, "label_tokens": 123456789},
    {"step": 2, "epoch": 1.0, "loss": 0.1 + 0.2, "grad_norm": math.nan},
    {"step": 3, "epoch": 1.5, "loss": 1e-30, "eval_loss": 0.375},
]
PROJECT = {"id": "p", "name": "tests", "entity": {"id": "e", "name": "me"}}


def wandb_config(mode: str = "offline") -> TrainConfig:
    config = TrainConfig()
    config.data.path = "train.jsonl"
    log = config.log
    log.wandb, log.project, log.group, log.name, log.tags = mode, "tests", "a group", "a name", ["one", "two"]
    config.method.r = 8
    config.optim.learning_rate = 4.9e-4
    return config


def record_run(folder: Path, records: list[dict], mode: str = "offline", resume_step: int = 0) -> None:
    config = wandb_config(mode)
    model_info = {"trainable_parameters": 10}
    tracker = Tracker.open(config, folder, is_main=True, total_steps=3, resume_step=resume_step, model_info=model_info)
    for record in records:
        tracker.log(record)
    write_summary(folder, SUMMARY)
    tracker.close(SUMMARY)


def key_of(item) -> str:
    return item.key or "/".join(item.nested_key)


def history_of(records: list) -> dict[int, dict]:
    steps = {}
    for record in records:
        if record.HasField("history"):
            values = {key_of(item): json.loads(item.value_json) for item in record.history.item}
            steps[record.history.step.num] = {key: value for key, value in values.items() if not key.startswith("_")}
    return steps


def offline_files(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*/*.wandb"))


class FakeServer(http.server.ThreadingHTTPServer):
    """As much of W&B's server as a run needs; ``silent`` stops all answers, as a lost network does."""

    daemon_threads = True

    def __init__(self) -> None:
        self.upserts: list[dict] = []
        self.history: list[dict] = []
        self.exit_codes: list[int] = []
        self.alerts: list[dict] = []
        self.silent = False
        super().__init__(("127.0.0.1", 0), FakeHandler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def bucket(self, run_id: str) -> dict:
        return {"id": "x", "name": run_id, "displayName": "", "config": "{}"}

    def tails(self) -> dict:
        """What a run that is resumed asks for: how much there is of it, and the last of it."""
        counts = {"historyLineCount": len(self.history), "eventsLineCount": 0, "logLineCount": 0}
        last = [json.dumps(line) for line in self.history[-1:]]
        tails = {"historyTail": json.dumps(last), "eventsTail": "[]"}
        return {**counts, **tails, "summaryMetrics": "{}", "tags": [], "notes": "", "wandbConfig": '{"t": 1}'}

    def answer(self, path: str, body: bytes) -> dict:
        if path.endswith("/file_stream"):
            content = json.loads(body)
            lines = content.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.history += [json.loads(line) for line in lines]
            self.exit_codes += [content["exitcode"]] if "exitcode" in content else []
            return {}
        if not path.endswith("/graphql"):
            return {}
        request = json.loads(body)
        asked = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
        assert asked
        variables = request.get("variables") or {}
        if asked[1] == "UpsertBucket":
            self.upserts.append(variables)
            bucket = {**self.bucket(variables["name"]), "project": PROJECT}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if asked[1] == "RunResumeStatus" and any(upsert["name"] == variables["name"] for upsert in self.upserts):
            return {"data": {"model": {**PROJECT, "bucket": {**self.bucket(variables["name"]), **self.tails()}}}}
        if asked[1] == "NotifyScriptableRunAlert":
            self.alerts.append(variables)
        if asked[1] == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/up/{name}"} for name in variables["files"]]
            return {"data": {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": files}}}
        return {"data": {"model": None}}


class FakeHandler(http.server.BaseHTTPRequestHandler):
    server: FakeServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        while self.server.silent:
            time.sleep(0.1)
        answer = json.dumps(self.server.answer(self.path, body)).encode()
        # A client that has given up in the meantime is part of the test.
        with contextlib.suppress(OSError):
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    do_GET = do_PUT = do_POST

    def log_message(self, *arguments: object) -> None:
        pass
