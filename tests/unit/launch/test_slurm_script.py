"""The batch script: what the config asks for stands in it, and bash reads it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.slurm import script
from launch.slurm.job import LIVES_FILE, begin, read_lives, saved_step
from launch.slurm.script import find_template, render, warn_seconds
from launch.slurm.snapshot import snapshot
from launch.slurm.submit import describe, submit
from tests.helpers.processes import run
from trainer.config import load
from trainer.errors import ConfigError, LaunchError

KEYS = [
    "launch=slurm", "launch.nodes=4", "launch.gpus_per_node=8", "launch.cpus_per_node=64", "launch.memory=0",
    "launch.time=12:00:00", "launch.partition=gpu", "launch.account=mine", "launch.qos=high", "launch.constraint=h100",
    "launch.sbatch_args=['--reservation=x']", "launch.srun_args=['--container-image=a b']", "launch.nproc_per_node=8",
    "launch.setup=['module load cuda/12.4','export A=\"b c\"']",
]  # fmt: skip


def test_every_key_is_in_it(tmp_path: Path) -> None:
    text = render(load(KEYS), tmp_path / "run")
    options = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    for option in (
        *("--nodes=4", "--gpus-per-node=8", "--cpus-per-task=64", "--mem=0", "--time=12:00:00", "--partition=gpu"),
        *("--account=mine", "--qos=high", "--constraint=h100", "--reservation=x", "--requeue", "--open-mode=append"),
        *("--ntasks-per-node=1", "--signal=B:USR1@120", f"--output={tmp_path}/run/slurm-%j.out"),
    ):
        assert options.count(option) == 1, option
    assert "\n##SBATCH" not in text
    for line in ("module load cuda/12.4", 'export A="b c"', "export AFINA_NPROC_PER_NODE=8"):
        assert line in text.splitlines()
    assert "srun_args=('--container-image=a b')" in text
    (tmp_path / "job").write_text(text)
    run(["bash", "-n", tmp_path / "job"])


def test_without_keys_it_is_the_script_that_comes_with_it() -> None:
    plain = render(load(["launch=slurm"]))
    assert [line for line in find_template().read_text().splitlines() if line.startswith("#SBATCH")] == [
        line for line in plain.splitlines() if line.startswith("#SBATCH")
    ]


def test_ones_own_script_is_filled_in(tmp_path: Path) -> None:
    own = tmp_path / "my.sbatch"
    own.write_text(find_template().read_text().replace("set -uo pipefail", "# mine\nset -uo pipefail"))
    text = render(load(["launch=slurm", f"launch.script={own}", "launch.qos=low"]))
    assert "# mine" in text
    assert "#SBATCH --qos=low" in text
    own.write_text("#!/bin/bash\nsrun x\n")
    with pytest.raises(ConfigError, match=r"has lost its lines .* afina slurm-script"):
        render(load(["launch=slurm", f"launch.script={own}"]))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["launch.time=4h"], "launch.time=4h: sbatch does not read it"),
        (["launch.memory=lots"], "launch.memory=lots"),
        (["launch.partition='a b'"], "is one word"),
        (["launch.sbatch_args=['-p gpu']"], "must begin with --"),
        (["launch.script=nowhere.sbatch"], "there is no such file"),
    ],
)
def test_what_sbatch_would_refuse_is_refused_before(keys: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(["launch=slurm", *keys])
    assert said in str(error.value)


def test_keys_of_slurm_are_refused_elsewhere() -> None:
    with pytest.raises(ConfigError, match=r"launch\.partition=gpu.*asks it for nothing → launch=slurm"):
        load(["launch=torchrun", "launch.partition=gpu"])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["launch=torchrun", "launch.warn_seconds=30"], r"launch\.warn_seconds=30: says what Slurm"),
        (["launch=slurm", "launch.node_rank=1"], r"launch\.node_rank=1: is of nodes that are started by hand"),
        (["launch=slurm", "launch.master_address=node7"], r"launch\.master_address=node7"),
        (["launch=slurm", "sweep.parallel=2"], r"sweep\.parallel=2: .* launch\.array_parallel=2"),
    ],
)
def test_what_would_do_nothing_is_refused(keys: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(keys)


def test_trials_at_once_are_of_a_sweep(tmp_path: Path) -> None:
    keys = ["launch=slurm", "debug=tiny", "launch.array_parallel=2", f"run.dir={tmp_path}"]
    with pytest.raises(ConfigError, match=r"launch\.array_parallel=2: .* this is one run"):
        submit(load(keys), keys)


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "::1", "127.1.2.3"])
def test_a_master_that_is_each_node_itself_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"launch\.master_address=.*is each node itself"):
        load(["launch=torchrun", "launch.nodes=2", f"launch.master_address='{address}'"])


def test_the_warning_comes_early_enough_for_three_saves(tmp_path: Path) -> None:
    config = load(["launch=slurm"])
    for taken, expected in ((None, 120), (10.0, 120), (200.0, 600)):
        (tmp_path / "summary.json").write_text(json.dumps({"save_seconds": taken}))
        assert warn_seconds(config, tmp_path) == expected
    assert warn_seconds(load(["launch=slurm", "launch.warn_seconds=33"]), tmp_path) == 33


def test_a_copy_of_the_program_runs_by_itself(tmp_path: Path) -> None:
    code = snapshot(tmp_path)
    assert snapshot(tmp_path) == code
    words = ["-c", "import trainer.config as c; print(c.__file__); print(c.load(['debug=tiny']).data.path)"]
    env = {"PYTHONPATH": str(code)}
    where, data = run([sys.executable, *words], cwd=tmp_path, env=env).output.split()
    assert Path(where).is_relative_to(code)
    assert Path(data).is_relative_to(code)


def test_the_job_begins_with_what_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["debug=tiny", "run.name=ab", f"run.dir={tmp_path}"]
    folder = tmp_path / "ab"
    assert begin(keys) == f"0 100 600 {folder}"
    for name in ("step-00000003", "step-00000012", "step-00000020.partial"):
        (folder / "checkpoints" / name).mkdir(parents=True)
    for name in ("step-00000003", "step-00000012"):
        (folder / "checkpoints" / name / "COMPLETE").touch()
    assert saved_step(folder) == 12
    assert begin([*keys, "launch.max_requeues=7", "launch.rendezvous_seconds=60"]) == f"12 7 60 {folder}"
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    with pytest.raises(LaunchError, match="--ntasks-per-node=2: starts as many torchruns"):
        begin(keys)


def test_lines_of_lives_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    life = {"job": "7", "code": 1, "status": None, "error": None, "stopped_by": None, "first_step": 0}
    life |= {"saved_step": 3, "restarts": 0, "outcome": "x", "unheard": 1}
    lines = ["{", "[]", json.dumps({"job": "7"}), json.dumps(life), json.dumps({**life, "job": "8"})]
    (tmp_path / LIVES_FILE).write_text("\n".join(lines) + "\n")
    assert [each.saved_step for each in read_lives(tmp_path, "7")] == [3]
    assert len(read_lives(tmp_path)) == 2


def test_without_slurm_submitting_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["launch=slurm", "debug=tiny", "run.name=x", f"run.dir={tmp_path}"]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match=r"launch\.kind=slurm: sbatch is not on this machine's PATH"):
        submit(load(keys), keys)
    assert not (tmp_path / "x").exists()
    assert describe(load(keys), keys).startswith(f"# would run: sbatch {tmp_path}/x/job.sbatch launch=slurm")


def test_the_marks_are_where_render_looks() -> None:
    text = find_template().read_text()
    assert [text.count(mark) for mark in (*script._OPTIONS, *script._SETUP)] == [1, 1, 1, 1]
    assert subprocess.run(["bash", "-n", str(find_template())], check=False).returncode == 0
