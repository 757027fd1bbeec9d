"""Several trials at once: each with its share and its own log; a signal stops all of them. Runs are stood in for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT

TRAIN = """
import json, os, signal, sys, time
from trainer.config import load, run_folder, to_yaml
def load_libraries():
    pass
def main(arguments):
    config = load(arguments)
    folder = run_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    names = ("OMP_NUM_THREADS", "WANDB_RUN_ID", "WANDB_NAME", "WANDB_PROJECT", "CUDA_VISIBLE_DEVICES")
    seen = {name: os.environ.get(name) for name in names}
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    print("words of", folder.name, flush=True)
    (folder / f"began-{os.getpid()}").touch()
    if config.method.r == 16:
        print("error: no memory", file=sys.stderr, flush=True)
        return 5
    end = time.monotonic() + (60 if os.path.exists("slow") else 0.3)
    while not stopped and time.monotonic() < end:
        time.sleep(0.02)
    status = "preempted" if stopped else "finished"
    (folder / "new.json").write_text(json.dumps({"status": status, "metrics": {"eval_loss": 1.5}, "seen": seen}))
    os.replace(folder / "new.json", folder / "summary.json")
    return 75 if stopped else 0
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""
KEYS = ["sweep", "debug=tiny", "run.name=s", "sweep.parallel=3", "sweep.fuse=off", "log=off"]


@pytest.fixture
def sweep(tmp_path: Path) -> list[str]:
    """The command, in a working folder in which ``trainer.train`` is the stand-in."""
    package = tmp_path / "trainer"
    package.mkdir()
    (package / "__init__.py").write_text(f"__path__.append({str(ROOT / 'trainer')!r})\nkeep_working_folder_out = int\n")
    (package / "__init__.py").write_text((package / "__init__.py").read_text() + "deny_others_writing = int\n")
    (package / "train.py").write_text(TRAIN)
    return [sys.executable, "-c", "import sys; from trainer.cli.app import main; sys.exit(main())", *KEYS]


def environment(tmp_path: Path) -> dict[str, str]:
    kept = {
        name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    }
    given = {"WANDB_RUN_ID": "one", "WANDB_NAME": "mine", "WANDB_PROJECT": "theirs"}
    return {**kept, **given, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.slow
def test_several_at_once(sweep: list[str], tmp_path: Path) -> None:
    command = [*sweep, "method.r=2,4,8,16"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stderr
    folder = tmp_path / "runs" / "s"
    lines = done.stderr.splitlines()
    assert lines[0] == "sweep of 4 runs, 3 at once in runs/s"
    assert lines[1] == "not given to the trials: WANDB_RUN_ID, WANDB_NAME, which one W&B run alone can have"
    assert sorted(line for line in lines[2:] if line.endswith("starting")) == [
        f"[{number}/4] r{r}: starting" for number, r in enumerate((2, 4, 8, 16), 1)
    ]
    assert sum("finished in 0 s: eval_loss 1.5000" in line for line in lines) == 3
    assert "[4/4] r16: failed: no memory" in lines, "its own word, though it left no summary"
    assert len(lines) == 11, "what trials print stands in files of their own"
    for r in (2, 4, 8):
        assert (folder / f"r{r}.log").read_text() == f"words of r{r}\n"
        seen = summary(folder / f"r{r}")["seen"]
        assert seen["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 3))
        assert (seen["WANDB_RUN_ID"], seen["WANDB_NAME"], seen["WANDB_PROJECT"]) == (None, None, "theirs")


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_all_and_the_same_command_goes_on(
    sweep: list[str], tmp_path: Path, sent: signal.Signals
) -> None:
    (tmp_path / "slow").touch()
    command, folder = [*sweep, "method.r=2,4,8,10"], tmp_path / "runs" / "s"
    started = subprocess.Popen(command, cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE, text=True)
    for r in (2, 4, 8):
        wait_for_any(folder / f"r{r}", "began-*")
    started.send_signal(sent)
    out, _ = started.communicate(timeout=60)
    assert started.returncode == 75
    assert [summary(folder / f"r{r}")["status"] for r in (2, 4, 8)] == ["preempted"] * 3
    assert not (folder / "r10").exists(), "no other is begun"
    assert out.count("preempted") == 3
    (tmp_path / "slow").unlink()
    done = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished") == 4


@pytest.mark.slow
def test_a_killed_server_is_told_and_the_rest_goes_on(sweep: list[str], tmp_path: Path) -> None:
    (tmp_path / "slow").touch()
    command, folder = [*sweep, "method.r=2,4", "sweep.parallel=1"], tmp_path / "runs" / "s"
    started = subprocess.Popen(command, cwd=tmp_path, env=environment(tmp_path), stderr=subprocess.PIPE, text=True)
    began = wait_for_any(folder / "r2", "began-*")
    status = Path(f"/proc/{began.name.removeprefix('began-')}/status").read_text()
    server = int(next(line for line in status.splitlines() if line.startswith("PPid")).split()[1])
    (tmp_path / "slow").unlink()
    os.kill(server, signal.SIGKILL)
    _, err = started.communicate(timeout=200)
    assert started.returncode == 1
    assert "[1/2] r2: failed: training process of runs/s/r2: is lost" in err
    assert summary(folder / "r4")["status"] == "finished"
    os.kill(int(began.name.removeprefix("began-")), signal.SIGTERM)


def wait_for_any(folder: Path, pattern: str) -> Path:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if found := next(folder.glob(pattern), None):
            return found
        time.sleep(0.05)
    raise AssertionError(f"{folder / pattern} never came")
