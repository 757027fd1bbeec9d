"""What a run leaves behind is complete, strict, and survives a kill at any byte."""

import errno
import io
import json
import logging
import math
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.wandb_runs import SUMMARY
from trainer.config.schema import TrainConfig
from trainer.errors import CheckpointError
from trainer.redaction import redact
from trainer.tracking.environment import write_environment
from trainer.tracking.files import (
    SUMMARY_KEYS,
    MetricsFile,
    build_summary,
    describe_error,
    find_summary,
    read_metrics,
    read_summary,
    write_summary,
)
from trainer.tracking.terminal import clock, step_line
from trainer.tracking.tracker import Tracker

ROOT = Path(__file__).parents[3]


def silent_config(every_steps: int = 1) -> TrainConfig:
    config = TrainConfig()
    config.log.wandb = "off"
    config.log.every_steps = every_steps
    return config


def open_tracker(folder: Path, total_steps: int = 10, resume_step: int = 0, every_steps: int = 1) -> Tracker:
    config = silent_config(every_steps)
    return Tracker.open(config, folder, is_main=True, total_steps=total_steps, resume_step=resume_step, model_info={})


def train_record(step: int) -> dict:
    return {
        "step": step,
        "epoch": step / 10,
        "loss": 1 / step,
        "grad_norm": 0.1,
        "learning_rate": 4.9e-4,
        "useful_tokens_per_second": 320.4,
        "peak_memory_bytes": 2 * 2**30,
    }


def test_one_line_a_step_holds_what_was_logged(tmp_path):
    tracker = open_tracker(tmp_path)
    records = [{"step": 0, "epoch": 0.0, "eval_loss": 2.5}, *(train_record(step) for step in range(1, 4))]
    records[3]["eval_loss"] = 1.5
    for record in records:
        tracker.log(record)
        # On the disk at once: a kill after this line loses nothing of it.
        assert read_metrics(tmp_path)[-1] == record
    tracker.close(SUMMARY)
    assert read_metrics(tmp_path) == records


def test_only_due_steps_evaluations_and_the_last_are_written(tmp_path):
    tracker = open_tracker(tmp_path, total_steps=11, every_steps=4)
    for step in range(1, 12):
        tracker.log(train_record(step) | ({"eval_loss": 1.0} if step == 6 else {}))
    assert [record["step"] for record in read_metrics(tmp_path)] == [4, 6, 8, 11]


def test_the_same_step_again_is_merged_into_its_line(tmp_path):
    tracker = open_tracker(tmp_path)
    tracker.log(train_record(1))
    tracker.log(train_record(2))
    tracker.log({"step": 2, "eval_loss": 0.5})
    tracker.log(train_record(3))
    assert read_metrics(tmp_path) == [train_record(1), train_record(2) | {"eval_loss": 0.5}, train_record(3)]
    with pytest.raises(AssertionError, match="step 2 was logged after step 3"):
        tracker.log(train_record(2))


def test_other_ranks_leave_nothing(tmp_path, capsys):
    config = silent_config()
    tracker = Tracker.open(config, tmp_path / "run", is_main=False, total_steps=5, resume_step=0, model_info={})
    tracker.log(train_record(1))
    tracker.samples([{"prompt": "a", "reference": "b", "answer": "c"}])
    tracker.close(SUMMARY)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_not_a_number_is_null_and_the_files_are_strict_json(tmp_path):
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    tracker = open_tracker(tmp_path)
    tracker.log(train_record(1) | {"loss": math.nan, "grad_norm": math.inf})
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line["loss"] is None
    assert line["grad_norm"] is None
    write_summary(tmp_path, {**SUMMARY, "train_loss": math.nan, "metrics": {"eval_loss": -math.inf}})
    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert (summary["train_loss"], summary["metrics"]) == (None, {"eval_loss": None})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_kill_at_any_byte_and_a_resume_at_any_step_leave_one_line_a_step(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("run")
    total = data.draw(st.integers(1, 12), label="total steps")
    reference = [{"step": 0, "eval_loss": 3.0}, *({"step": step, "loss": step / 7} for step in range(1, total + 1))]
    reference[-1]["eval_loss"] = 0.5
    resume_step, path = 0, folder / "metrics.jsonl"
    for life in range(data.draw(st.integers(0, 4), label="kills")):
        file = MetricsFile(folder, resume_step=resume_step)
        until = data.draw(st.integers(resume_step, total), label="reached")
        # The first values of steps that are done again must not survive.
        for record in reference[resume_step + (resume_step > 0) : until + 1]:
            file.write(record | {"life": life})
        file.close()
        content = path.read_bytes()
        intact = content.rfind(b"\n", 0, -1) + 1
        path.write_bytes(content[: data.draw(st.integers(intact, len(content)), label="torn at")])
        known = [record["step"] for record in read_metrics(folder)]
        resume_step = data.draw(st.sampled_from([0, *known]), label="resumed at")
    file = MetricsFile(folder, resume_step=resume_step)
    for record in reference[resume_step + (resume_step > 0) :]:
        file.write(record)
    file.close()
    found = read_metrics(folder)
    assert [record["step"] for record in found] == list(range(total + 1))
    assert [{key: record[key] for key in record if key != "life"} for record in found] == reference
    assert all("life" not in record for record in found[max(1, resume_step + 1) :])


def test_a_broken_line_in_the_middle_is_named_when_read_and_dropped_when_reopened(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n\x00\x00\n{"step": 2}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:2"):
        read_metrics(tmp_path)
    MetricsFile(tmp_path, resume_step=5).close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    with pytest.raises(CheckpointError, match="No such file"):
        read_metrics(tmp_path / "absent")


class FullDisk(io.FileIO):
    """A file that takes ``room`` more bytes, as a disk does that fills up."""

    room = 0

    def write(self, content):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = super().write(content[: self.room])
        self.room -= taken
        return taken


@pytest.mark.parametrize("merged", [False, True])
def test_a_full_disk_is_said_once_and_no_line_is_lost_when_there_is_room_again(tmp_path, capsys, merged):
    tracker = open_tracker(tmp_path)
    tracker.log(train_record(1))
    tracker._metrics._file.close()
    disk = FullDisk(tmp_path / "metrics.jsonl", "ab")
    tracker._metrics._file = disk
    disk.room = 25
    tracker.log(train_record(2))
    tracker.log(train_record(3))
    if merged:
        tracker.log({"step": 3, "eval_loss": 0.5})
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]
    disk.room = 10**6
    tracker.log(train_record(4))
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert ("eval_loss" in read_metrics(tmp_path)[2]) == merged
    assert capsys.readouterr().out.count("No space left on device") == 1


def test_summary_is_read_back_and_an_incomplete_one_refused(tmp_path):
    assert read_summary(tmp_path) is None
    assert find_summary(tmp_path) == {}
    write_summary(tmp_path, SUMMARY)
    assert read_summary(tmp_path) == find_summary(tmp_path) == build_summary(**SUMMARY)
    error = {"kind": "training", "message": "loss is nan", "rank": 1}
    write_summary(tmp_path, {**SUMMARY, "status": "failed", "error": error})
    assert read_summary(tmp_path)["error"] == error
    with pytest.raises(AssertionError, match="train_loss"):
        write_summary(tmp_path, {key: value for key, value in SUMMARY.items() if key != "train_loss"})
    with pytest.raises(AssertionError, match="status"):
        write_summary(tmp_path, {**SUMMARY, "status": "done"})
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not a JSON object"):
        read_summary(tmp_path)
    assert find_summary(tmp_path) == {}


def test_a_summary_has_one_shape_however_the_run_ended(tmp_path):
    error = CheckpointError("state.safetensors", reason="is missing")
    failed = build_summary(status="failed", steps=2, wall_seconds=1.0, error=describe_error(error, rank=1))
    assert tuple(failed) == tuple(build_summary(**SUMMARY)) == SUMMARY_KEYS
    write_summary(tmp_path, failed)
    assert read_summary(tmp_path) == failed
    assert failed["error"] == {"kind": "checkpoint", "message": "state.safetensors: is missing", "rank": 1}
    error.rank = 0  # every rank raises it; this one met it
    assert describe_error(error, rank=1)["rank"] == 0
    assert describe_error(ValueError("odd"), rank=1) == {"kind": "ValueError", "message": "odd", "rank": 1}
    with pytest.raises(AssertionError, match="status"):
        build_summary(status="done", steps=0, wall_seconds=0.0)


def test_step_line():
    line = step_line({**train_record(12), "loss": 0.4123}, 75, 192.4)
    assert line == "step 12/75 loss 0.412 lr 4.9e-04 320 tok/s 2.0 GiB eta 3:12"
    assert step_line({"step": 0, "epoch": 0, "eval_loss": 2.34567}, 75, None) == "step 0/75 eval_loss 2.346"
    assert clock(3 * 3600 + 62) == "3:01:02"


@pytest.mark.parametrize(("total_steps", "most"), [(200, 200), (5000, 210)])
def test_piped_lines_are_plain_and_not_too_many(tmp_path, capsys, total_steps, most):
    tracker = open_tracker(tmp_path, total_steps=total_steps)
    for step in range(1, total_steps + 1):
        tracker.log(train_record(step) | ({"eval_loss": 1.0} if step == 7 else {}))
    logging.getLogger("trainer").info("saved")
    tracker.samples([{"prompt": "two\nlines", "reference": "r", "answer": "\x1b[31mred\x07"}])
    tracker.close(SUMMARY)
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert "\r" not in output
    lines = output.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert most / 2 < len(steps) <= most
    assert any(line.startswith(f"step 7/{total_steps} ") for line in steps)
    assert steps[-1].startswith(f"step {total_steps}/")
    assert lines[-6:] == [
        "saved",
        "sample 1",
        "  prompt     two",
        "             lines",
        "  reference  r",
        "  answer     \ufffd[31mred\ufffd",
    ]
    assert len(read_metrics(tmp_path)) == total_steps
    logged = (tmp_path / "log.txt").read_text()
    assert all(line in logged for line in lines)


def test_prompts_of_samples_are_shown_once(tmp_path, capsys, monkeypatch):
    def rows(*answers: str) -> list[dict[str, str]]:
        return [{"prompt": f"question {n}", "reference": "yes", "answer": a} for n, a in enumerate(answers)]

    tracker = open_tracker(tmp_path)
    for answers in (("no", "yes"), ("yes", "yes"), ("y" * 99, "two\nlines")):
        tracker.samples(rows(*answers))
    tracker.close(SUMMARY)
    assert capsys.readouterr().out.splitlines()[8:] == [
        "sample 1: no → yes (reference yes)",
        "sample 2: yes (reference yes)",
        f"sample 1: yes → {'y' * 59}… (reference yes)",
        "sample 2: yes → two lines (reference yes)",
    ]
    logged = (tmp_path / "log.txt").read_text()
    assert logged.count("question 0") == 3
    assert "y" * 99 in logged
    monkeypatch.setenv("AFINA_TRIAL", "1")
    tracker = open_tracker(tmp_path / "trial")
    tracker.samples(rows("no", "yes"))
    tracker.close(SUMMARY)
    assert "question" not in capsys.readouterr().out
    assert "question 1" in (tmp_path / "trial" / "log.txt").read_text()


TERMINAL_RUN = """
import logging, sys
from pathlib import Path
from trainer.config.schema import TrainConfig
from trainer.tracking.tracker import Tracker
config = TrainConfig()
config.log.wandb = "off"
tracker = Tracker.open(config, Path(sys.argv[1]), is_main=True, total_steps=3, resume_step=0, model_info={})
for step in range(1, 4):
    tracker.log({"step": step, "loss": 0.125, "useful_tokens_per_second": 77.0, "peak_memory_bytes": 3 * 2**30})
logging.getLogger("trainer").info("[bold]saved[/bold]")
tracker.samples([{"prompt": "why", "reference": "because", "answer": "[red]so"}])
tracker.close({})
print("after")
"""


def test_a_terminal_gets_a_bar(tmp_path):
    main, side = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": "120"}
    command = [sys.executable, "-c", TERMINAL_RUN, str(tmp_path)]
    process = subprocess.Popen(command, stdout=side, stderr=subprocess.PIPE, env=environment)
    os.close(side)
    output = b""
    while True:
        try:
            block = os.read(main, 65536)
        except OSError:
            break
        if not block:
            break
        output += block
    assert process.wait(timeout=60) == 0, process.stderr.read()
    text = output.decode()
    for expected in ("3/3", "loss 0.125", "77 tok/s", "3.0 GiB", "[bold]saved[/bold]", "because", "[red]so", "after"):
        assert expected in text


def test_a_reader_that_leaves_does_not_stop_the_run(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = f"{sys.executable} -c '{TERMINAL_RUN}' {tmp_path} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(read_metrics(tmp_path)) == 3


def test_environment_names_versions_and_hides_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "s3cret" * 8)
    monkeypatch.setattr(sys, "argv", ["train", "method.r=8", "x.api_key=abc", f"note={'s3cret' * 8}"])
    write_environment(tmp_path, {"devices": ["cpu"], "hosts": ["a", "b"]})
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["command"][1:] == ["train", "method.r=8", "x.api_key=<redacted>", "note=<redacted>"]
    assert environment["packages"]["torch"].startswith("2.")
    assert environment["hosts"] == ["a", "b"]
    assert environment["python"].startswith("3.")
    assert "s3cret" not in (tmp_path / "environment.json").read_text()
    for harmless in ("optim.learning_rate=3", "batch.micro_tokens=4096", "generate.max_new_tokens=64"):
        assert redact(harmless) == harmless
    assert redact("hf_" + "a" * 30) == "<redacted>"


def test_environment_names_the_commit(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "code").mkdir()
    monkeypatch.chdir(tmp_path / "code")
    git("init", "-q")
    Path("file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    Path("file").write_text("2")
    write_environment(tmp_path)
    found = json.loads((tmp_path / "environment.json").read_text())["git"]
    assert found == {"commit": git("rev-parse", "HEAD"), "changed": True}
