"""How runs stand, by their folders alone; their logs; asking one to stop."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import jobs
from launch.slurm import queue
from launch.slurm.queue import JobState
from launch.slurm.submit import JOB_FILE
from tests.helpers.report_folders import write_run
from trainer.checkpoint.owner import own_run, show_owner
from trainer.cli import main
from trainer.errors import LaunchError
from trainer.tracking.files import STOP_FILE

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(queue, "has_slurm", lambda: False)
    folder = tmp_path / "runs"
    write_run(folder / "done", steps=10)
    write_run(folder / "dead", steps=10, status=None)
    write_run(folder / "broken", steps=10, status="failed", error="no memory")
    for rank in (4, 8):
        write_run(folder / "sweep" / f"r{rank}", steps=10)
    (folder / "notes").mkdir()
    return folder


def test_each_stands_as_its_folder_says(runs: Path, capsys: Capture) -> None:
    assert main(["status"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert {line[0].removeprefix("runs/"): (line[1], line[2]) for line in lines} == {
        "broken": ("failed", "6"), "dead": ("unfinished", "6"), "done": ("finished", "10"),
        "sweep/r4": ("finished", "10"), "sweep/r8": ("finished", "10"),
    }  # fmt: skip
    assert main(["status", "sweep"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert main(["status", "notes"]) == 3
    assert "no folder of a run or a sweep" in capsys.readouterr().err


def test_one_that_is_trained_is_asked_to_stop(runs: Path, capsys: Capture) -> None:
    with own_run(runs / "dead"), show_owner(runs / "dead"):
        found = jobs.standing(runs / "dead")
        assert (found.status, found.is_live, found.is_queued) == ("running", True, False)
        assert main(["cancel", "dead"]) == 0
    assert "is asked to stop" in capsys.readouterr().out
    assert (runs / "dead" / STOP_FILE).exists()
    assert main(["cancel", "done"]) == LaunchError.exit_code
    assert "is finished, and nobody trains it" in capsys.readouterr().err
    assert main(["cancel", "sweep"]) == 0
    assert "none of its 2 runs is running or queued" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("state", "status"),
    [("PENDING", "queued"), ("RUNNING", "running"), ("COMPLETED", "unfinished"), (None, "unfinished")],
)
def test_a_job_of_slurm_says_the_rest(
    runs: Path, monkeypatch: pytest.MonkeyPatch, state: str | None, status: str
) -> None:
    (runs / "dead" / JOB_FILE).write_text("7\n")
    monkeypatch.setattr(queue, "has_slurm", lambda: True)
    monkeypatch.setattr(queue, "find_job", lambda job: JobState(state, "None") if state and job == "7" else None)
    cancelled: list[str] = []
    monkeypatch.setattr(queue, "cancel", cancelled.append)
    found = jobs.standing(runs / "dead")
    assert (found.status, found.job) == (status, "7")
    if found.is_live:
        assert "job 7 is cancelled" in jobs.stop(runs / "dead")
    assert cancelled == (["7"] if found.is_live else [])


def test_logs(runs: Path, capsys: Capture) -> None:
    assert main(["logs", "done", "-n", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"finished 10 steps in 23 s: {runs / 'done'}")
    assert main(["logs", "done", "--follow"]) == 0
    (runs / "done" / "log.txt").unlink()
    assert main(["logs", "done"]) == LaunchError.exit_code
    assert "has no log yet" in capsys.readouterr().err
