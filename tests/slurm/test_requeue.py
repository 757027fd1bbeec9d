"""A job under a real Slurm, stopped in every way there is, goes on by itself and ends as if nothing had happened."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest

from tests.helpers import warm
from tests.helpers.processes import ROOT, afina
from tests.helpers.slurm_sandbox import Sandbox
from tests.slurm.conftest import LOOPBACK

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

STEPS = 150
KEYS = [
    *("debug=tiny", f"batch.max_steps={STEPS}", "batch.epochs=200", "checkpoint.every_steps=10", "log.wandb=offline"),
    *("data.validation=0", "eval.metrics=[loss]"),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slurm")


@pytest.fixture(scope="module")
def undisturbed(work: Path, tiny_model: Path) -> Callable[[], str]:
    """The adapter of the same run, which nobody stopped."""

    @cache
    def train() -> str:
        warm.afina("train", *KEYS, "run.name=undisturbed", f"run.dir={work}", cwd=ROOT, env={"OMP_NUM_THREADS": "1"})
        return adapter(work / "undisturbed")

    return train


def adapter(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def submit(slurm: Sandbox, work: Path, name: str, *more: str) -> str:
    """Submit as a user does; return the job's number."""
    environment = {**slurm.environment, **LOOPBACK, "OMP_NUM_THREADS": "1"}
    said = afina("train", "launch=slurm", *KEYS, f"run.name={name}", f"run.dir={work}", *more, env=environment).output
    assert f"submitted: {work / name}" in said
    return said.split("job ")[1].split()[0]


def wait_for_step(folder: Path, step: int, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        file = folder / "metrics.jsonl"
        if file.exists() and f'"step": {step},' in file.read_text():
            return
        time.sleep(0.2)
    raise AssertionError(f"{folder} has not come to step {step}:\n{log(folder)}")


def log(folder: Path) -> str:
    return "\n".join(file.read_text() for file in folder.glob("slurm-*.out"))


def warn(slurm: Sandbox, job: str) -> None:
    slurm.call("scancel", "--batch", "-s", "USR1", job)


def preempt(slurm: Sandbox, job: str) -> None:
    slurm.call("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")


def reach_time_limit(slurm: Sandbox, job: str) -> None:
    # Limits are looked at every half minute, in which a fast machine ends the run: its ranks stand still till then.
    slurm.call("scancel", "--signal=STOP", job)
    slurm.call("scontrol", "update", f"jobid={job}", "EndTime=now")
    end = time.monotonic() + 120
    while slurm.fields(job)["Restarts"] == "0":
        assert time.monotonic() < end, "it was not put back into the queue"
        time.sleep(0.5)
    slurm.call("scontrol", "update", f"jobid={job}", "TimeLimit=30")  # minutes; the other has become its limit


def requeue(slurm: Sandbox, job: str) -> None:
    slurm.call("scontrol", "requeue", job)


def lose_node(slurm: Sandbox, job: str) -> None:
    node = slurm.fields(job)["NodeList"]
    slurm.call("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    time.sleep(6)
    with suppress(subprocess.CalledProcessError):  # it may have come back by itself
        slurm.call("scontrol", "update", f"nodename={node}", "state=resume")


STOPS: dict[str, tuple[Callable[[Sandbox, str], None], list[str], str | None]] = {
    # How it is stopped, what is asked for, and what the job says of its first life, where Slurm lets it speak.
    "warned": (warn, [], "asked to stop by SIGUSR1"),
    "preempted": (preempt, ["launch.sbatch_args=['--exclusive']"], "preempted"),
    "at the time limit": (reach_time_limit, [], "at the time limit"),
    "requeued": (requeue, [], None),
    "node lost": (lose_node, [], None),
}


@pytest.mark.parametrize("how", STOPS)
def test_it_goes_on_by_itself(how: str, slurm: Sandbox, work: Path, undisturbed: Callable[[], str]) -> None:
    stop, keys, said = STOPS[how]
    name = how.replace(" ", "-")
    folder = work / name
    job = submit(slurm, work, name, *keys)
    wait_for_step(folder, 15)
    wandb = (folder / "wandb" / "run_id.txt").read_text()
    stop(slurm, job)
    fields = slurm.wait(job, timeout_seconds=200)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), log(folder)
    assert adapter(folder) == undisturbed()
    assert (folder / "wandb" / "run_id.txt").read_text() == wandb
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))
    lives = [json.loads(line) for line in (folder / "slurm.jsonl").read_text().splitlines()]
    assert lives[-1]["outcome"] == "finished"
    assert lives[-1]["first_step"] >= 10
    assert said is None or lives[0]["outcome"] == said, lives


def test_what_is_cancelled_saves_and_stays_away(slurm: Sandbox, work: Path, tiny_model: Path) -> None:
    job = submit(slurm, work, "cancelled")
    wait_for_step(work / "cancelled", 15)
    environment = {**slurm.environment, **LOOPBACK}
    assert "running" in afina("status", work / "cancelled", env=environment).output
    again = afina("train", "launch=slurm", *KEYS, "run.name=cancelled", f"run.dir={work}", env=environment, check=False)
    assert (again.returncode, again.output.count("\n")) == (4, 1), again.output
    said = afina("cancel", work / "cancelled", env=environment).output
    assert f"job {job} is cancelled" in said
    fields = slurm.wait(job, timeout_seconds=60)
    assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0"), log(work / "cancelled")
    assert json.loads((work / "cancelled" / "summary.json").read_text())["status"] == "preempted"
    assert "stopped on request" in afina("logs", work / "cancelled", env=environment).output
    assert "preempted" in afina("status", work / "cancelled", env=environment).output


def test_what_crashes_at_once_is_not_requeued_for_ever(slurm: Sandbox, work: Path, tmp_path: Path) -> None:
    """Its processes die, as a host without memory kills them, before they have saved anything."""
    killed = tmp_path / "python"
    killed.write_text(f'#!/bin/bash\ncase "$*" in *trainer.torchrun*) kill -9 $$;; esac\nexec {sys.executable} "$@"\n')
    killed.chmod(0o755)
    script = ROOT / "slurm" / "train.sbatch"
    folder = work / "crashing"
    folder.mkdir()  # as a run that had begun before
    environment = {**LOOPBACK, "AFINA_PYTHON": str(killed)}
    command = ["sbatch", "--parsable", f"--output={folder}/slurm-%j.out", str(script), *KEYS]
    job = slurm.call(*command, "run.name=crashing", f"run.dir={work}", cwd=ROOT, environment=environment)
    fields = slurm.wait(job, timeout_seconds=120)
    assert (fields["JobState"], fields["Restarts"]) == ("FAILED", "2"), log(folder)
    assert "not requeued: 2 restarts in a row have saved no step after 0" in log(folder)


@pytest.mark.parametrize("export", ["NONE", "AFINA_X=1"])
def test_the_environment_need_not_come_along(export: str, slurm: Sandbox, work: Path, tmp_path: Path) -> None:
    """`--export=NONE` leaves neither job nor steps a PATH; what is needed is in the script."""
    text = (ROOT / "slurm" / "train.sbatch").read_text()
    lines = "\n".join(f"export {name}='{value}'" for name, value in {**LOOPBACK, "WANDB_MODE": "offline"}.items())
    (tmp_path / "job").write_text(text.replace("# ---- end of setup", f"{lines}\n# ---- end of setup"))
    command = ["sbatch", "--parsable", f"--export={export}", f"--output={tmp_path}/out", str(tmp_path / "job")]
    keys = ["debug=tiny", "batch.max_steps=2", "eval.metrics=[loss]", f"run.name=x-{export[:4]}", f"run.dir={work}"]
    job = slurm.call(*command, *keys, cwd=ROOT)
    fields = slurm.wait(job, timeout_seconds=120)
    assert fields["JobState"] == "COMPLETED", (tmp_path / "out").read_text()


def test_two_tasks_a_node_are_refused(slurm: Sandbox, tmp_path: Path) -> None:
    script = str(ROOT / "slurm" / "train.sbatch")
    command = ["sbatch", "--parsable", "--ntasks-per-node=2", f"--output={tmp_path}/out", script, "debug=tiny"]
    fields = slurm.wait(slurm.call(*command, cwd=ROOT, environment=LOOPBACK), timeout_seconds=60)
    assert (fields["JobState"], fields["ExitCode"]) == ("FAILED", "4:0")
    said = (tmp_path / "out").read_text()
    assert said.startswith("error: --ntasks-per-node=2: starts as many torchruns on each node")
    assert said.count("\n") == 1
